"""The words of a query, which the label head reads beside the vector of the tower.

Linear models of words, such as XR-Linear and Parabel, learn what a rare word stands for, which
the vector of a tower blurs. So the head has a trained vector for each token of the vocabulary, and
adds up those of the query's text: a bag of words, as in fastText (arXiv 1607.01759).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_TOKENS = 128  # Of a text; those that follow are not read.


def add_up(table: Float[Array, "v e"], tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
    """The sum of the rows of each text's tokens, divided by the root of their number.

    Args:
      table: Row i is that of the tokens i, i + v, i + 2 v and so on: with a table of the size of
        the vocabulary, each token has its own.
      tokens: Token ids of each text from the left; -1 behind its end.

    Returns:
      The sums; zero for a text without tokens.
    """
    is_real = tokens >= 0
    rows = jnp.where(is_real, tokens % len(table), len(table))
    found = jnp.asarray(table).at[rows].get(mode="fill", fill_value=0)  # [b, t, e]
    count = jnp.sum(is_real, axis=1, keepdims=True)
    return jnp.sum(found, axis=1) / jnp.sqrt(jnp.maximum(count, 1).astype(table.dtype))
