"""The words of a query, which the label head reads beside the vector of the tower.

Linear models of words, such as XR-Linear and Parabel, learn what a rare word stands for, which
the vector of a tower blurs. So the head has a trained vector for each token and for each pair of
adjacent tokens, and adds up those of the query's text (a bag of words and pairs of words, as in
fastText, arXiv 1607.01759). Tokens and pairs share the rows of one table by hashing.
"""

from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_TOKENS = 128  # Of a text; those that follow are not read.
# Odd numbers far from multiples of each other (from the finaliser of MurmurHash3 and from xxHash).
_FIRST, _SECOND, _MIX = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D


def hashed(tokens: Int[Array, "b t"], num_rows: int, xp: ModuleType = jnp) -> Int[Array, "b w"]:
    """The rows of the tokens of each text, then of its pairs of adjacent tokens; w = 2 t - 1.

    Args:
      tokens: Token ids of each text from the left; -1 behind its end.
      num_rows: Rows of the table.
      xp: `jax.numpy`, or `numpy` for the same numbers on the host.

    Returns:
      Rows in [0, num_rows), int32; `num_rows` where there is no token or no pair.
    """
    unsigned = tokens.astype(xp.uint32)

    def row(mixed: Array, is_real: Array) -> Array:
        mixed = (mixed ^ (mixed >> 15)) * xp.uint32(_MIX)
        mixed = mixed ^ (mixed >> 13)
        return xp.where(is_real, (mixed % xp.uint32(num_rows)).astype(xp.int32), num_rows)

    one = row(unsigned * xp.uint32(_FIRST), tokens >= 0)
    pair = unsigned[:, :-1] * xp.uint32(_FIRST) + (unsigned[:, 1:] + 1) * xp.uint32(_SECOND)
    return xp.concatenate([one, row(pair, tokens[:, 1:] >= 0)], axis=1)


def add_up(table: Float[Array, "v e"], tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
    """The sum of the rows of each text's tokens and pairs, divided by the root of their number.

    Args:
      table: A row for each hash.
      tokens: See `hashed`.

    Returns:
      The sums; zero for a text without tokens.
    """
    rows = hashed(tokens, len(table))  # [b, w]
    found = jnp.asarray(table).at[rows].get(mode="fill", fill_value=0)  # [b, w, e]
    count = jnp.sum(rows < len(table), axis=1, keepdims=True)
    return jnp.sum(found, axis=1) / jnp.sqrt(jnp.maximum(count, 1).astype(table.dtype))
