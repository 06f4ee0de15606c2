"""The relevance of a batch, which tests write as a matrix, as the loss takes it."""

import jax.numpy as jnp

from vixml_jax.structs import Positives


def as_pairs(relevance):
    """Positives of queries (rows), and the labels (columns), each of which has an id of its own."""
    rows, columns = jnp.indices(relevance.shape)
    labels = jnp.where(relevance, columns, -1)
    return Positives(rows.reshape(-1), labels.reshape(-1)), jnp.arange(relevance.shape[1])
