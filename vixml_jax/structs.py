"""Structures shared by several packages; named tuples, so pytrees without importing jax."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int


class PackedItems(NamedTuple):
    """Items of a batch (queries or labels), several in each row of fixed width.

    Each item occupies consecutive positions of one row, by default its images and then its tokens.
    Positions of no item are empty and have no effect.
    """

    tokens: Int[Any, "p s"]  # Token ids; 0 at images and empty positions.
    segments: Int[Any, "p s"]  # Index of the item in the batch; -1 at empty positions.
    positions: Int[Any, "p s"]  # Position within the item, as the tower's embeddings count it.
    image_at: Int[Any, "p s"]  # Index into `images`; -1 at tokens and empty positions.
    images: Float[Any, "i v"]  # Image embeddings, float16; zero where an item has no image.


class Positives(NamedTuple):
    """Labels of the queries of a batch, in no particular order; padding is -1 in both arrays.

    With several shards, each holds the labels of its own queries in its part of the arrays.
    """

    queries: Int[Any, " p"]  # Index of the query within the batch.
    labels: Int[Any, " p"]  # Row of the label set.


class Batch(NamedTuple):
    """One training batch: b queries, c candidate labels, and which are labels of which queries.

    Queries and labels are packed together, so that the tower encodes them in one pass: item i < b
    is query i, item b + j is label j.
    """

    items: PackedItems
    query_ids: Int[Any, " b"]  # Row of the training set; -1 for padding of the last batch.
    label_ids: Int[Any, " c"]  # Row of the label set; -1 for padding. May repeat.
    # All labels of the queries, or those among the candidates if the step trains no label head.
    positives: Positives
    tokens: Int[Any, "b t"] | None = None  # Of the queries' texts, if the head reads words.


class HeadBatch(NamedTuple):
    """One batch of a head epoch: queries whose vectors are in the bank, and all their labels."""

    query_ids: Int[Any, " b"]  # Row of the training set; -1 for padding of the last batch.
    positives: Positives
    tokens: Int[Any, "b t"] | None = None  # See `Batch`.


class LabelState(NamedTuple):
    """State of each label besides its text; rows are padded to a multiple of the row shards.

    The free vectors themselves are trained and belong to the parameters (`params["free"]`).
    """

    centroids: Float[Any, "n e"]
    cluster_of: Int[Any, " n"]  # Index of the free vector that the label shares.


class TrainState(NamedTuple):
    """The state that a training step updates and a checkpoint holds."""

    step: Any  # Number of updates done, int32 scalar.
    # Trained part of {"tower": ..., "combiner": ..., "free": [f, e], "head": ...}, float32.
    params: Any
    # Frozen part: the tower if it has adapters or only the head is trained, otherwise {}. It has no
    # gradients.
    frozen: Any
    opt_state: Any
    labels: LabelState
    bank: Float[Any, "n e"]  # Unit embedding of each training query from its last batch.


class Shard(NamedTuple):
    """The rows on one process of an array that is sharded over several processes."""

    ids: Int[Any, " m"]  # Row ids in the full array, ascending.
    values: Float[Any, "m e"]


class Queries(NamedTuple):
    """Encoded queries, on the host."""

    vectors: Float[Any, "q e"]  # Unit vectors of the tower.
    head: Float[Any, "q e"] | None = None  # What the label head scores; None without a head.

    def at(self, rows: Any) -> "Queries":
        """The queries of these rows."""
        return Queries(self.vectors[rows], None if self.head is None else self.head[rows])


class SearchResult(NamedTuple):
    """The best labels of each query, best first; missing ones have id -1 and score -inf."""

    scores: Float[Any, "q k"]
    ids: Int[Any, "q k"]
