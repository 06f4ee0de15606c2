"""What benchmarks share: synthetic data, published tower sizes, workers that take turns.

Nothing outside `benchmarks` imports it.
"""
