"""What a command sets up in its process: console output, memory, the compilation cache.

Also helpers for nested dicts of parameters that need no jax.
"""
