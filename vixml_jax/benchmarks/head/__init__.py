"""A step of the label head compared with the same in PyTorch; see `__main__`."""
