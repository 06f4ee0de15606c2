"""One optimizer step of the label head, block by block.

The rows of a block and their moments are updated as soon as their gradient is known. So nothing of
the size of all rows is stored beside the parameters and their moments, not even a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vixml_jax.labels.blocked_logits import (
    Block,
    Cotangents,
    block_at,
    block_gradient,
    for_blocks,
    scores,
)
from vixml_jax.labels.head import LabelHead, ScoredBatch, Selection, is_row, query_params
from vixml_jax.parallel.sharding import ROWS
from vixml_jax.structs import Positives


def update(
    head: LabelHead,
    params: Any,
    opt_state: Any,
    queries: Float[Array, "b e"],
    positives: Positives,
    row_mask: Bool[Array, " b"],
    optimizer: optax.GradientTransformation,
    selection: Selection | None = None,
    tokens: Int[Array, "b t"] | None = None,
) -> tuple[Any, Any, dict[str, Float[Array, ""]]]:
    """The result of `optimizer.update` with the gradient of `head.loss_of`.

    Args:
      head: The label head.
      params: {"head": parameters}; for them and for all arguments that are not named here, see
        `LabelHead.loss_of`.
      opt_state: State of the optimizer; with a selection, moments of the selected rows only.
      queries, positives, row_mask, selection, tokens: See there. The queries get no gradient.
      optimizer: Updates each entry by its own gradient, as Adam does.

    Returns:
      Parameters, state of the optimizer, and the scalars `loss` and `gradient_norm`.
    """
    paths, structure = jax.tree.flatten_with_path((params, opt_state))
    has_rows = [is_row(path) for path, _ in paths]

    def split(tree: Any) -> tuple[list[Array], list[Array]]:
        parts: tuple[list[Array], list[Array]] = ([], [])
        for leaf, of_rows in zip(jax.tree.leaves(tree), has_rows, strict=True):
            parts[0 if of_rows else 1].append(leaf)
        return parts

    def join(rows: list[Array], others: list[Array]) -> Any:
        left, right = iter(rows), iter(others)
        return structure.unflatten(next(left if of_rows else right) for of_rows in has_rows)

    def step(
        rows: list[Array], others: list[Array], gradient: Any
    ) -> tuple[list[Array], list[Array]]:
        """Updates both by the gradient of some parameters; all others have a gradient of zero."""
        params, opt_state = join(rows, others)
        gradient = {"head": jax.tree.map(jnp.zeros_like, params["head"]) | gradient}
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return split((optax.apply_updates(params, updates), opt_state))

    def local(
        g: Array, rows: list[Array], batch: ScoredBatch, others: list[Array]
    ) -> tuple[Array, Array, Array, list[Array]]:
        start = join(rows, others)[0]["head"]
        g, labels, pairs, loss_of = head.on_device(g, start["vectors"], start["bias"], batch)
        if head.loss == "bce":  # Its slopes need no sum over all labels, which are read once.
            of_all = jnp.zeros_like(g[:, 0]), jnp.zeros_like(pairs.query, g.dtype)
        else:
            of_all = scores(g, labels, pairs, head.loss, head.label_block)
        loss, pull = jax.vjp(loss_of, *of_all)
        cotangents = Cotangents(*pull(jnp.ones_like(loss)))

        def update_block(block: Block, carry: Any) -> Any:
            d_g, of_all, squares, rows, previous, of_previous = carry
            # Written only now: XLA would copy all rows if it found them read and written at once.
            rows = [previous.put(x, _bits(y)) for x, y in zip(rows, of_previous, strict=True)]
            now = join(rows, others)[0]["head"]
            now = labels._replace(vectors=now["vectors"], bias=now["bias"])
            found = block_gradient(g, now, pairs, of_all[0], cotangents, head.loss, block)
            of_block = {"vectors": found.vectors, "bias": found.bias}
            before = take(block, rows)
            after, _ = step(before, others, of_block)
            # Rows of the block before have been updated already.
            after = list(map(block.where_new, after, before))
            squares += sum(jnp.sum(jnp.square(x)) for x in of_block.values())
            of_all = tuple(x + y for x, y in zip(of_all, found.scores, strict=True))
            return d_g + found.queries, of_all, squares, rows, block, after

        def take(block: Block, rows: list[Array]) -> list[Array]:
            return [block.take(x).view(dtype) for x, dtype in zip(rows, dtypes, strict=True)]

        first = block_at(0, len(labels.bias), head.label_block)
        dtypes, rows = [x.dtype for x in rows], list(map(_bits, rows))
        squares = jnp.zeros_like(g[0, 0])
        carry = (jnp.zeros_like(g), of_all, squares, rows, first, take(first, rows))
        d_g, of_all, squares, rows, last, of_last = for_blocks(
            len(labels.bias), head.label_block, update_block, carry
        )
        rows = [last.put(x, _bits(y)).view(y.dtype) for x, y in zip(rows, of_last, strict=True)]
        d_g = jax.lax.psum_scatter(d_g, ROWS, tiled=True)
        return loss_of(*of_all), d_g, jax.lax.psum(squares, ROWS), rows

    sharded = jax.shard_map(
        local,
        mesh=head.mesh,
        in_specs=(P(ROWS), P(ROWS), P(ROWS), P()),
        out_specs=(P(), P(ROWS), P(), P(ROWS)),
    )
    reading = query_params(params["head"])
    g, pull = jax.vjp(lambda reading: head.scaled(reading, queries, tokens), reading)
    rows, others = split((params, opt_state))
    batch = head.scored_batch(positives, row_mask, selection)
    loss, d_g, squares, rows = sharded(g, rows, batch, others)
    (gradient,) = pull(d_g)
    no_rows = [jnp.zeros((0, *x.shape[1:]), x.dtype) for x in rows]
    _, others = step(no_rows, others, gradient)
    norm = jnp.sqrt(squares + optax.tree.norm(gradient, squared=True))
    return *join(rows, others), {"loss": loss, "gradient_norm": norm}


def _bits(x: Array) -> Array:
    """bfloat16 as integers, since XLA for CPUs converts all rows to float32 where some change."""
    return x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x
