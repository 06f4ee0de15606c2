"""The contrastive loss: the paper's (arXiv 2511.13189, section 3), or a softmax over the batch.

Pure functions of arrays.

Everything is computed in float32. Masks say which rows and columns are real; padding may hold any
finite numbers and changes neither the loss nor a gradient.

On a mesh, each device scores its own rows against all columns, so that devices exchange embedding
vectors and never scores. `axes` names the mesh axes that the rows are sharded over; it is empty on
a single device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vixml_jax.models.layers import prefix
from vixml_jax.parallel import sharding
from vixml_jax.parallel.sharding import ROWS
from vixml_jax.structs import Positives

# Replaces the score of a satisfied negative before the softmax, as published. Such a negative has
# no weight, unless all negatives of the row are satisfied: then all have the same weight.
_SATISFIED = -50.0
_EXCLUDED = -1e9  # Below `_SATISFIED` at any temperature.
_COLUMNS = 128  # Columns of a row that are counted together when a positive is drawn.

MeshAxes = tuple[str, ...]
# (scores, positive, row_mask, column_mask, key, axes=) -> loss, number of violators
ContrastFn = Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]


def total_loss(
    queries: Float[Array, "b e"],
    labels: Float[Array, "c e"],
    prototypes: Float[Array, "c e"] | None,
    positives: Positives,
    label_ids: Int[Array, " c"],
    row_mask: Bool[Array, " b"],
    column_mask: Bool[Array, " c"],
    key: Array,
    *,
    kind: str = "triplet",
    num_negatives: int,
    margin_min: float,
    margin_max: float,
    temperature: float,
    softmax_temperature: float = 0.05,
    regulariser: float = 0.1,
    tie_gradient: bool = True,
    widths: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the four terms, or the query -> label term alone where there are no prototypes.

    Three terms compare queries with labels, queries with prototypes, and labels with queries; each
    is of the given kind. The fourth is the prototype margin term.

    Args:
      queries: Unit vectors.
      labels: Unit vectors of the labels from the tower.
      prototypes: Unit vectors of the same labels from the combiner, or None.
      positives: All labels of the queries, each once, whether they are candidates or not.
      label_ids: The candidates; may repeat. -1 is no label of any query.
      row_mask: True for real queries.
      column_mask: True for real candidates.
      key: Draws the positives, independently in each term.
      kind: "triplet", as published (`triplet_loss`), or "softmax" or "decoupled_softmax"
        (`softmax_loss`).
      num_negatives: Hardest negatives of each row.
      margin_min: See `triplet_loss`, also for `margin_max` and `temperature`.
      softmax_temperature: See `softmax_loss`.
      regulariser: Weight of the prototype margin term.
      tie_gradient: See `triplet_loss`.
      widths: With some, the result is the mean over them and e of the result for the first columns
        of all vectors, scaled to unit length again (Matryoshka representation learning, arXiv
        2205.13147). Each width has its own hardest negatives; the positives drawn are the same for
        all.
      mesh: Rows are sharded over its (replica, fsdp) axes, which changes the result by rounding
        only; None: one device holds all rows.

    Returns:
      The loss, and scalars: each term by name, and the mean number of violators of the query ->
      label term.
    """
    if kind == "triplet":
        contrast = functools.partial(
            triplet_loss,
            num_negatives=num_negatives,
            margin_min=margin_min,
            margin_max=margin_max,
            temperature=temperature,
            tie_gradient=tie_gradient,
        )
    else:
        contrast = functools.partial(
            softmax_loss, temperature=softmax_temperature, decoupled=kind == "decoupled_softmax"
        )
    terms = functools.partial(
        _mean_terms,
        widths=sorted({*widths, queries.shape[1]}),
        contrast=contrast,
        regulariser=regulariser,
        num_negatives=num_negatives,
        tie_gradient=tie_gradient,
    )
    if mesh is None or sharding.num_row_shards(mesh) == 1:
        arrays = (queries, labels, prototypes, label_ids, row_mask, column_mask)
        return terms(*arrays, positives, key)
    b, c = (sharding.pad_rows(len(rows), mesh) for rows in (queries, labels))
    sharded_terms = jax.shard_map(
        functools.partial(terms, axes=ROWS),
        mesh=mesh,
        in_specs=(*[P(ROWS)] * 6, P(), P()),
        out_specs=P(),
    )
    return sharded_terms(
        _pad(queries, b),
        _pad(labels, c),
        None if prototypes is None else _pad(prototypes, c),
        _pad(label_ids, c),
        _pad(row_mask, b),
        _pad(column_mask, c),
        positives,
        key,
    )


def _mean_terms(
    queries: Float[Array, "b e"],
    labels: Float[Array, "c e"],
    prototypes: Float[Array, "c e"] | None,
    *others: Any,
    widths: Sequence[int],
    **settings: Any,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean over widths of the results of `_terms` for the first columns of the vectors."""
    found = []
    for width in widths:
        vectors = jax.tree.map(lambda x: prefix(x, width), (queries, labels, prototypes))  # noqa: B023
        found.append(_terms(*vectors, *others, **settings))
    return jax.tree.map(lambda *x: sum(x) / len(x), *found)


def _terms(
    queries: Float[Array, "b e"],
    labels: Float[Array, "c e"],
    prototypes: Float[Array, "c e"] | None,
    label_ids: Int[Array, " c"],
    row_mask: Bool[Array, " b"],
    column_mask: Bool[Array, " c"],
    positives: Positives,
    key: Array,
    *,
    contrast: ContrastFn,
    regulariser: float,
    num_negatives: int,
    tie_gradient: bool,
    axes: MeshAxes = (),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The result of `total_loss`, from this device's queries and labels, and all positives."""
    text_key, prototype_key, label_key, margin_key = jax.random.split(key, 4)
    all_columns, all_row_mask = _all_rows(column_mask, axes), _all_rows(row_mask, axes)
    first = len(queries) * (jax.lax.axis_index(axes) if axes else 0)
    own = positives._replace(queries=positives.queries - first)
    relevance = relevance_of(_all_rows(label_ids, axes), own, len(queries)).T
    scores = _similarity(queries, _all_rows(labels, axes))
    loss, violators = contrast(scores, relevance, row_mask, all_columns, text_key, axes=axes)
    zero = jnp.zeros_like(loss)
    scalars = {"loss_text": loss, "loss_prototype": zero, "loss_label": zero, "loss_margin": zero}
    if prototypes is not None:
        prototype_scores = _similarity(queries, _all_rows(prototypes, axes))
        scalars["loss_prototype"], _ = contrast(
            prototype_scores, relevance, row_mask, all_columns, prototype_key, axes=axes
        )
        # Computing the scores again is cheaper than sending them to the devices of their columns.
        scalars["loss_label"], _ = contrast(
            _similarity(labels, _all_rows(queries, axes)),
            relevance_of(label_ids, positives, len(all_row_mask)),
            column_mask,
            all_row_mask,
            label_key,
            axes=axes,
        )
        scalars["loss_margin"] = prototype_margin_loss(
            scores,
            prototype_scores,
            relevance,
            row_mask,
            all_columns,
            margin_key,
            num_negatives=num_negatives,
            tie_gradient=tie_gradient,
            axes=axes,
        )
        loss += scalars["loss_prototype"] + scalars["loss_label"]
        loss += regulariser * scalars["loss_margin"]
    return loss, scalars | {"violators": violators}


def relevance_of(
    label_ids: Int[Array, " c"], positives: Positives, num_queries: int
) -> Bool[Array, "c b"]:
    """Whether each label is one of each query's.

    Args:
      label_ids: Labels; may repeat. A negative one is no label of any query.
      positives: Labels of queries, each once. Those of other queries than 0 to `num_queries` - 1
        have no effect.
      num_queries: b.
    """
    ascending = jnp.sort(label_ids)
    at = jnp.searchsorted(ascending, positives.labels)
    is_candidate = (positives.labels >= 0) & (ascending[at] == positives.labels)
    held = is_candidate & (positives.queries >= 0) & (positives.queries < num_queries)
    # Every pair has an entry of its own, those without an effect outside of the array: GPUs can
    # write them in any order, which they would otherwise give up to be deterministic.
    at = jnp.where(held, at, len(label_ids) + jnp.arange(len(at)))
    of_distinct = jnp.zeros((len(label_ids), num_queries), bool)
    of_distinct = of_distinct.at[at, positives.queries].set(True, mode="drop", unique_indices=True)
    return of_distinct[jnp.searchsorted(ascending, label_ids)]


def triplet_loss(
    scores: Float[Array, "b c"],
    positive: Bool[Array, "b c"],
    row_mask: Bool[Array, " b"],
    column_mask: Bool[Array, " c"],
    key: Array,
    *,
    num_negatives: int,
    margin_min: float,
    margin_max: float,
    temperature: float = 0.1,
    tie_gradient: bool = True,
    axes: MeshAxes = (),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Hinges of one positive per row against its hardest negatives, weighted towards the hardest.

    With s+ the score of a positive drawn uniformly and s- one of the `num_negatives` largest
    scores of negatives, the hinge is max(0, s- - s+ + margin). The margin is the gap |s+ - s-|
    clipped to [margin_min, margin_max], a constant for the gradient. A pair is thus satisfied from
    a gap of margin_min on, and a pair in the wrong order costs more. The weights are a softmax of
    s- over the negatives whose hinge is positive; the gradient passes through them.

    Args:
      scores: Similarities in [-1, 1]; rows are the anchors.
      positive: Whether the column belongs to the row.
      row_mask: True for real rows, over which the mean is taken.
      column_mask: True for real columns.
      key: Draws the positives.
      num_negatives: Hardest negatives of each row. A row with fewer negatives uses those it has;
        positives and padding never replace them.
      margin_min: Smallest margin.
      margin_max: Largest margin.
      temperature: Of the softmax.
      tie_gradient: Gradient of a hinge that is exactly zero, as for every gap in [margin_min,
        margin_max]. True: 0.5, as published, which matters in rows where all hinges are zero;
        False: 0.
      axes: Mesh axes that the rows are sharded over; the result is that of all rows.

    Returns:
      The mean over real rows of the weighted sum of hinges (0 for a row without a positive or
      without a negative), and the mean number of negatives of a row that contribute.
    """
    chosen, has_positive = _draw_positive(positive & column_mask, key, axes)
    hardest, is_negative = _hardest_negatives(scores, positive, column_mask, num_negatives)
    counts = is_negative & (has_positive & row_mask)[:, None]  # [b, k]

    s_positive = jnp.take_along_axis(scores, chosen[:, None], axis=1)  # [b, 1]
    s_negative = jnp.take_along_axis(scores, hardest, axis=1)  # [b, k]
    gap = jax.lax.stop_gradient(jnp.abs(s_positive - s_negative))
    margin = jnp.clip(gap, margin_min, margin_max)
    hinge = jnp.where(counts, _hinge(s_negative - s_positive + margin, tie_gradient), 0.0)

    logits = jnp.where(hinge > 0, s_negative, _SATISFIED) / temperature
    weights = jax.nn.softmax(jnp.where(counts, logits, _EXCLUDED), axis=1)
    weighted = weights * hinge
    num_rows = jnp.maximum(_sum(row_mask, axes), 1)
    return _sum(weighted, axes) / num_rows, _sum(weighted > 0, axes) / num_rows


def softmax_loss(
    scores: Float[Array, "b c"],
    positive: Bool[Array, "b c"],
    row_mask: Bool[Array, " b"],
    column_mask: Bool[Array, " c"],
    key: Array | None = None,
    *,
    temperature: float,
    decoupled: bool = False,
    axes: MeshAxes = (),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of a softmax over the columns, averaged over all positives of a row.

    Args:
      scores: Similarities in [-1, 1]; rows are the anchors.
      positive: Whether the column belongs to the row.
      row_mask: True for real rows, over which the mean is taken.
      column_mask: True for real columns.
      key: Not used; nothing is drawn.
      temperature: Scores are divided by it.
      decoupled: Whether the other positives of the row are left out of the denominator of each
        (DEXML, arXiv 2310.10636, section 3.2).
      axes: Mesh axes that the rows are sharded over; the result is that of all rows.

    Returns:
      The mean over real rows (0 for a row without a positive), and the mean number of negatives of
      a row that score above its lowest positive.
    """
    del key
    positive &= column_mask & row_mask[:, None]
    negative = ~positive & column_mask
    logits = scores / temperature
    negatives = jnp.where(negative, logits, _EXCLUDED)
    if decoupled:
        of_negatives = jax.nn.logsumexp(negatives, axis=1, keepdims=True)
        # -log softmax of each positive among itself and the negatives.
        costs = jax.nn.softplus(of_negatives - logits)
    else:
        all_logits = jnp.where(column_mask, logits, _EXCLUDED)
        costs = jax.nn.logsumexp(all_logits, axis=1, keepdims=True) - logits
    count = jnp.maximum(jnp.sum(positive, axis=1), 1)
    costs = jnp.sum(jnp.where(positive, costs, 0.0), axis=1) / count
    lowest = jnp.min(jnp.where(positive, logits, jnp.inf), axis=1, keepdims=True)
    num_rows = jnp.maximum(_sum(row_mask, axes), 1)
    return _sum(costs, axes) / num_rows, _sum(negatives > lowest, axes) / num_rows


def prototype_margin_loss(
    raw_scores: Float[Array, "b c"],
    prototype_scores: Float[Array, "b c"],
    positive: Bool[Array, "b c"],
    row_mask: Bool[Array, " b"],
    column_mask: Bool[Array, " c"],
    key: Array,
    *,
    num_negatives: int,
    margin: float = 0.1,
    tie_gradient: bool = True,
    axes: MeshAxes = (),
) -> Float[Array, ""]:
    """Hinge loss by which prototypes separate labels better than label embeddings, by a margin.

    At one positive per row, drawn uniformly, the prototype should score higher than the embedding
    by `margin`; at the hardest negatives of the prototypes, lower by `margin`. Each of these two
    terms is the mean of its hinges above zero, 0 if there are none; the result is their mean.

    Args:
      raw_scores: Similarities of queries and label embeddings.
      prototype_scores: Similarities of the same queries and the same labels' prototypes.
      positive: Whether the candidate is a label of the query.
      row_mask: True for real queries.
      column_mask: True for real candidates.
      key: Draws the positives.
      num_negatives: Hardest negatives of each row.
      margin: Difference wanted between prototype and embedding scores.
      tie_gradient: Whether a hinge that is exactly zero has the gradient 0.5, else 0.
      axes: See `triplet_loss`.

    Returns:
      The loss of all rows.
    """
    chosen, has_positive = _draw_positive(positive & column_mask, key, axes)
    hardest, is_negative = _hardest_negatives(
        prototype_scores, positive, column_mask, num_negatives
    )
    lead = prototype_scores - raw_scores
    at_positive = jnp.take_along_axis(lead, chosen[:, None], axis=1)  # [b, 1]
    at_negative = jnp.take_along_axis(lead, hardest, axis=1)  # [b, k]
    real = row_mask[:, None]
    above = _hinge(margin - at_positive, tie_gradient)
    below = _hinge(margin + at_negative, tie_gradient)
    return 0.5 * (
        _active_mean(above, has_positive[:, None] & real, axes)
        + _active_mean(below, is_negative & real, axes)
    )


def _similarity(rows: Float[Array, "b e"], columns: Float[Array, "c e"]) -> Float[Array, "b c"]:
    # Accelerators multiply in bfloat16 or TF32 by default, too coarse for margins of 0.1.
    return jnp.einsum(
        "be,ce->bc", rows, columns, precision="highest", preferred_element_type=jnp.float32
    )


def _draw_positive(
    positive: Bool[Array, "b c"], key: Array, axes: MeshAxes
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """A column drawn uniformly from each row's positives, and whether there is one."""
    num_rows, num_columns = positive.shape
    padded = jnp.pad(positive, ((0, 0), (0, -num_columns % _COLUMNS)))
    blocks = padded.reshape(num_rows, -1, _COLUMNS)
    up_to = jnp.cumsum(jnp.sum(blocks, axis=2, dtype=jnp.int32), axis=1)  # [b, blocks]
    count = up_to[:, -1]
    # One number per row rather than per score is cheaper, and padding columns do not change it.
    # Every device draws for all rows, so that the mesh does not change the draws.
    uniform = jax.random.uniform(key, (num_rows * jax.lax.axis_size(axes),))
    if axes:
        uniform = jax.lax.dynamic_slice_in_dim(
            uniform, jax.lax.axis_index(axes) * num_rows, num_rows
        )
    wanted = 1 + jnp.minimum((uniform * count).astype(jnp.int32), count - 1)
    # The block of columns that has the wanted positive, and then its column: sums over all columns
    # need four times the memory of the scores' mask.
    block = jnp.argmax(up_to >= wanted[:, None], axis=1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [b, _COLUMNS]
    before = jnp.take_along_axis(up_to, block[:, None], axis=1) - jnp.sum(
        inside, axis=1, keepdims=True
    )
    rank = before + jnp.cumsum(inside, axis=1, dtype=jnp.int32)
    return block * _COLUMNS + jnp.argmax(rank >= wanted[:, None], axis=1), count > 0


def _hardest_negatives(
    scores: Float[Array, "b c"],
    positive: Bool[Array, "b c"],
    column_mask: Bool[Array, " c"],
    num_negatives: int,
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"]]:
    """Columns of the largest scores of negatives, and which of these columns are negatives."""
    candidates = jnp.where(~positive & column_mask, jax.lax.stop_gradient(scores), -jnp.inf)
    largest, columns = jax.lax.top_k(candidates, min(num_negatives, scores.shape[1]))
    return columns, largest > -jnp.inf


def _hinge(x: Float[Array, "..."], tie_gradient: bool) -> Float[Array, "..."]:
    return jnp.maximum(x, 0.0) if tie_gradient else jax.nn.relu(x)


def _active_mean(
    hinge: Float[Array, "b k"], where: Bool[Array, "b k"], axes: MeshAxes
) -> Float[Array, ""]:
    active = where & (hinge > 0)
    return _sum(jnp.where(active, hinge, 0.0), axes) / jnp.maximum(_sum(active, axes), 1)


def _sum(x: Array, axes: MeshAxes) -> Float[Array, ""] | Int[Array, ""]:
    """The sum of all entries on all devices."""
    total = jnp.sum(x)
    return jax.lax.psum(total, axes) if axes else total


def _all_rows(x: Array, axes: MeshAxes) -> Array:
    """The rows of all devices."""
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _pad(x: Array, *sizes: int) -> Array:
    """`x` with its first dimensions padded with zeros to these sizes."""
    widths = [(0, size - old) for size, old in zip(sizes, x.shape, strict=False)]
    return jnp.pad(x, widths + [(0, 0)] * (x.ndim - len(sizes)))
