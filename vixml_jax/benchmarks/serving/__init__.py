"""Prediction in Python and over HTTP, compared with the same model in PyTorch."""
