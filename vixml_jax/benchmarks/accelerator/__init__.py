"""Checks and measures an accelerator in one command; see `__main__`."""
