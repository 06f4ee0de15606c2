"""Logits of a batch's queries and all labels of a device, in blocks of labels.

A statistic of each query's logits is summed up over the blocks. The backward pass computes the
logits of a block again and turns them into gradients. So memory grows with the size of a batch
times that of a block, never with the number of labels. (Where one block holds all labels, XLA
finds both computations to be the same and keeps the logits.)

The logits of positives are read from their block, and their gradients are added there: with many
positives this costs far less than gathering a vector for each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ABSENT = -1e30  # Log-weight of rows that are no labels; finite, so that no gradient is NaN.


class Labels(NamedTuple):
    """The labels that are scored.

    Attributes:
      vectors, bias: Their rows of the label head.
      log_weight: Logarithm of the number of labels that each stands for; it has no gradient.
    """

    vectors: Float[Array, "n e"]
    bias: Float[Array, " n"]
    log_weight: Float[Array, " n"]


class Pairs(NamedTuple):
    """Positives whose labels are scored; at padding, `query` is the number of queries."""

    query: Int[Array, " p"]
    label: Int[Array, " p"]


class Cotangents(NamedTuple):
    """Derivatives of the loss by both results of `scores`."""

    statistic: Float[Array, " b"]
    positive: Float[Array, " p"]


class BlockGradient(NamedTuple):
    """Gradients from one block of labels.

    Attributes:
      queries: The block's part of the gradient of the queries.
      vectors, bias: Gradients of the block's labels; 0 at those of the block before.
      scores: The block's parts of the results of `scores`, where these are sums ("bce"); else 0.
    """

    queries: Float[Array, "b e"]
    vectors: Float[Array, "k e"]
    bias: Float[Array, " k"]
    scores: tuple[Float[Array, " b"] | float, Float[Array, " p"] | float]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def scores(
    g: Float[Array, "b e"], labels: Labels, pairs: Pairs, kind: str, block_size: int
) -> tuple[Float[Array, " b"], Float[Array, " p"]]:
    """A statistic of each query's logits s = g.w + b, and the logits of the positives.

    The statistic is log sum exp(s + log_weight) over labels, without the query's positives if the
    loss is "decoupled_softmax"; if it is "bce", it is sum softplus(s) exp(log_weight).

    Args:
      g: Query vectors, scaled.
      labels: The labels.
      pairs: The positives; their logits are 0 at padding.
      kind: The loss.
      block_size: Labels scored at a time, at most.
    """

    def add_block(block: Block, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, s_positive = carry
        logits, log_weight = _logits(g, labels, block)
        at = block.places(pairs)
        if kind == "bce":
            of_block = _bce_scores(logits, log_weight, at)
            return largest, total + of_block[0], s_positive + of_block[1]
        s_positive += _at_positives(logits, at)
        logits = _without_positives(logits, at, kind) + log_weight
        new = jnp.maximum(largest, jnp.max(logits, axis=1))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        return new, total, s_positive

    zero = jnp.zeros_like(g[:, 0])
    start = (zero + ABSENT, zero, jnp.zeros_like(pairs.query, g.dtype))
    largest, total, s_positive = for_blocks(len(labels.bias), block_size, add_block, start)
    statistic = total if kind == "bce" else largest + jnp.log(jnp.maximum(total, 1e-30))
    return statistic, s_positive


def _scores_forward(
    g: Array, labels: Labels, pairs: Pairs, kind: str, block_size: int
) -> tuple[tuple[Array, Array], Any]:
    statistic, s_positive = scores(g, labels, pairs, kind, block_size)
    return (statistic, s_positive), (g, labels, pairs, statistic)


def _scores_backward(
    kind: str, block_size: int, residuals: Any, cotangents: tuple[Array, Array]
) -> tuple[Array, Labels, None]:
    g, labels, pairs, statistic = residuals

    def add_block(block: Block, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_g, d_vectors, d_bias = carry
        gradient = block_gradient(g, labels, pairs, statistic, Cotangents(*cotangents), kind, block)
        d_vectors = block.put(d_vectors, block.take(d_vectors) + gradient.vectors)
        d_bias = block.put(d_bias, block.take(d_bias) + gradient.bias)
        return d_g + gradient.queries, d_vectors, d_bias

    start = jax.tree.map(jnp.zeros_like, (g, labels.vectors, labels.bias))
    d_g, d_vectors, d_bias = for_blocks(len(labels.bias), block_size, add_block, start)
    return d_g, Labels(d_vectors, d_bias, jnp.zeros_like(d_bias)), None


scores.defvjp(_scores_forward, _scores_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Some consecutive rows of the labels; the first of them may belong to the block before.

    Attributes:
      start: First row.
      first_new: First row that the block before does not hold.
      size: Number of rows.
    """

    start: Int[Array, ""]
    first_new: Int[Array, ""]
    size: int = dataclasses.field(metadata={"static": True})

    def take(self, rows: Float[Array, "n ..."]) -> Float[Array, "k ..."]:
        """The block's rows of an array."""
        return jax.lax.dynamic_slice_in_dim(rows, self.start, self.size)

    def put(
        self, rows: Float[Array, "n ..."], values: Float[Array, "k ..."]
    ) -> Float[Array, "n ..."]:
        """An array with other rows for the block."""
        return jax.lax.dynamic_update_slice_in_dim(rows, values, self.start, axis=0)

    def where_new(
        self, values: Float[Array, "k ..."], otherwise: Float[Array, "k ..."] | float
    ) -> Float[Array, "k ..."]:
        """`values`, but `otherwise` in rows that the block before holds as well."""
        is_new = self.start + jnp.arange(self.size) >= self.first_new
        return jnp.where(is_new.reshape(-1, *[1] * (values.ndim - 1)), values, otherwise)

    def places(self, pairs: Pairs) -> tuple[Int[Array, " p"], Int[Array, " p"]]:
        """Index of each pair in the block's logits; out of bounds for those of other blocks."""
        is_inside = (pairs.label >= self.first_new) & (pairs.label < self.start + self.size)
        return pairs.query, jnp.where(is_inside, pairs.label - self.start, self.size)


def for_blocks(count: int, block_size: int, body: Callable[[Block, Any], Any], carry: Any) -> Any:
    """Runs `body` on blocks that hold `count` rows, at most `block_size` each.

    All have the same size, so the last ends with the last row and may overlap with the one before.

    Args:
      count: Number of rows.
      block_size: Largest number of rows of a block.
      body: (block, carry) -> carry.
      carry: Of the first block.
    """
    num_blocks = -(-count // block_size)
    return jax.lax.fori_loop(
        0, num_blocks, lambda index, carry: body(block_at(index, count, block_size), carry), carry
    )


def block_at(index: Int[Array, ""] | int, count: int, block_size: int) -> Block:
    """One of the blocks of `for_blocks`."""
    size = -(-count // -(-count // block_size))
    first_new = jnp.asarray(index * size, jnp.int32)
    return Block(jnp.minimum(first_new, count - size), first_new, size)


def block_gradient(
    g: Float[Array, "b e"],
    labels: Labels,
    pairs: Pairs,
    statistic: Float[Array, " b"],
    cotangents: Cotangents,
    kind: str,
    block: Block,
) -> BlockGradient:
    """The gradients of one block; other arguments as of `scores`, whose statistic is given."""
    logits, log_weight = _logits(g, labels, block)
    at = block.places(pairs)
    of_block = (0.0, 0.0)
    if kind == "bce":
        of_block = _bce_scores(logits, log_weight, at)
        slope = jax.nn.sigmoid(logits) * jnp.exp(log_weight)
    else:
        logits = _without_positives(logits, at, kind)
        slope = jnp.exp(logits + log_weight - statistic[:, None])
    slope = (slope * cotangents.statistic[:, None]).at[at].add(cotangents.positive, mode="drop")
    return BlockGradient(
        queries=slope @ block.take(labels.vectors),
        vectors=jnp.einsum("bk,be->ke", slope, g),
        bias=jnp.sum(slope, axis=0),
        scores=of_block,
    )


def _logits(
    g: Float[Array, "b e"], labels: Labels, block: Block
) -> tuple[Float[Array, "b k"], Float[Array, " k"]]:
    """Logits of a block, and log-weights: `ABSENT` at labels of the block before."""
    vectors, bias, log_weight = map(block.take, labels)
    # The precision of the run: logits need no more than training does, unlike ranked scores.
    logits = jnp.einsum("be,ke->bk", g, vectors, preferred_element_type=jnp.float32) + bias
    return logits, block.where_new(log_weight, ABSENT)


def _bce_scores(
    logits: Float[Array, "b k"], log_weight: Float[Array, " k"], at: tuple[Array, Array]
) -> tuple[Float[Array, " b"], Float[Array, " p"]]:
    """A block's parts of the results of `scores` for "bce"."""
    total = jnp.sum(jax.nn.softplus(logits) * jnp.exp(log_weight), axis=1)
    return total, _at_positives(logits, at)


def _at_positives(logits: Float[Array, "b k"], at: tuple[Array, Array]) -> Float[Array, " p"]:
    return logits.at[at].get(mode="fill", fill_value=0.0)


def _without_positives(
    logits: Float[Array, "b k"], at: tuple[Array, Array], kind: str
) -> Float[Array, "b k"]:
    if kind != "decoupled_softmax":
        return logits
    return logits.at[at].set(ABSENT, mode="drop")
