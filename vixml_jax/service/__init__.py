"""The HTTP service of a run, started by `vixml_jax serve`: predictions, labels, health, metrics."""
