"""The structures that pass from room to room: named tuples, so pytrees without importing jax."""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int


class PackedItems(NamedTuple):
    """Items of a batch (queries or labels), several to a row of fixed width.

    An item lies unbroken in one row: first its pictures, then its tokens. What is not an item
    is empty (segment -1), and takes part in nothing.
    """

    tokens: Int[Any, "p s"]  # 0 where an image or nothing is.
    segments: Int[Any, "p s"]  # Which item of the batch; -1 = empty.
    positions: Int[Any, "p s"]  # Position within the item, as the tower's embeddings count it.
    image_at: Int[Any, "p s"]  # Row of `images` that stands here; -1 = a token or nothing.
    images: Float[Any, "i v"]  # Embeddings of the pictures, float16; absent ones are zero.


class Batch(NamedTuple):
    """One training batch: b queries, c candidate labels, and which belongs to which.

    Both are packed together, so that the tower reads them in one pass: item i < b is query i, item
    b + j is label j.
    """

    items: PackedItems
    query_ids: Int[Any, " b"]  # Row of the training set; -1 = padding of the last batch.
    label_ids: Int[Any, " c"]  # Row of the label set; -1 = padding. Duplicates are kept.
    relevance: Bool[Any, "b c"]  # All true labels of the query among the candidates.


class LabelState(NamedTuple):
    """What is known of each label beside its text; rows are padded to the mesh.

    The free vectors themselves are trained, so they live with the parameters (`params["free"]`).
    """

    centroids: Float[Any, "n e"]
    cluster_of: Int[Any, " n"]  # Row of the free vectors that the label shares.


class TrainState(NamedTuple):
    """All that a training step reads and writes; what a checkpoint holds."""

    step: Any  # int32 scalar: updates done.
    params: Any  # What is trained of {"tower": ..., "combiner": ..., "free": [f, e]}, float32.
    frozen: Any  # What is not: the tower under adapters; else {}. No gradient of it ever exists.
    opt_state: Any
    labels: LabelState
    bank: Float[Any, "n e"]  # Unit embedding of each training query when last seen.


class Share(NamedTuple):
    """Those rows of an array that one process has, the array being spread over several."""

    ids: Int[Any, " m"]  # Rows of the whole, ascending.
    values: Float[Any, "m e"]


class SearchResult(NamedTuple):
    """The best labels of each query, best first; absent = id -1 and score -inf."""

    scores: Float[Any, "q k"]
    ids: Int[Any, "q k"]
