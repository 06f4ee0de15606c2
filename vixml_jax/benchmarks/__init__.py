"""Benchmarks: one module per question, run as `python -m vixml_jax.benchmarks.NAME`.

Each compares with a baseline in one run, on the same cores and inputs. Results: docs/benchmarks.md.
"""
