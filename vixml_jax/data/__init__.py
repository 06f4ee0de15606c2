"""Data sets: sources are read, prepared once, and then read in batches by training.

The modules use NumPy only, so that preparing data does not import JAX.
"""
