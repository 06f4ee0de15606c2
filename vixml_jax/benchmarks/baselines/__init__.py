"""Baselines of the benchmarks: PyTorch models and other search libraries.

Only benchmarks import them; none is a requirement of the package.
"""
