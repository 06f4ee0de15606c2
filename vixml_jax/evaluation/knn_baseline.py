"""The kNN baseline: labels of the nearest training queries by text, images or both, untrained."""

import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.data.store import Items, PreparedDataset
from vixml_jax.runtime import progress
from vixml_jax.structs import SearchResult

_WORD = re.compile(r"\w+")
# Smaller cosines are raised to this, so that a query unlike all others still gets predictions.
_LEAST_COSINE = 1e-3

# Returns the cosines [q, t] of some evaluated queries with some training queries.
_Similarity = Callable[[slice, slice], Float[np.ndarray, "q t"]]


def predict(
    dataset: PreparedDataset,
    *,
    split: str = "test",
    by: str = "text",
    k: int = 100,
    neighbours: int = 20,
    query_block: int = 1024,
    train_block: int = 4096,
) -> SearchResult:
    """Returns the k best labels of each query of a split.

    The score of a label is the sum of the squared cosines between the query and those of its
    nearest training queries that have the label. Among equal cosines the first training query is
    nearer, among equal scores the first label is better.

    Args:
      dataset: Prepared data.
      split: Evaluated split, 'test' or 'valid'.
      by: 'text' (TF-IDF of words), 'image' (mean embedding), or 'both' (mean of the two cosines).
      k: Labels per query.
      neighbours: Nearest training queries used per query.
      query_block, train_block: Rows compared at a time. They bound the memory used and do not
        change the result.
    """
    evaluated = getattr(dataset, split)
    cosine = {"text": _text, "image": _image, "both": _both}[by](evaluated, dataset.train)
    num_queries, num_train = len(evaluated), len(dataset.train)
    neighbours = min(neighbours, num_train)
    near = np.zeros((num_queries, neighbours), np.int64)
    best = np.full((num_queries, neighbours), -np.inf, np.float32)
    train_blocks = _slices(num_train, train_block)
    query_blocks = _slices(num_queries, query_block)
    total = num_train * num_queries
    with progress.track(f"kNN baseline, {by}", total, unit="cosines") as advance:
        for train in train_blocks:
            for queries in query_blocks:
                # Rounded, so that equal texts tie whatever the order of summation.
                scores = np.round(cosine(queries, train), 5)
                scores = np.concatenate([best[queries], scores], axis=1)
                at = _top(scores, neighbours)
                new = at >= neighbours
                old = np.take_along_axis(near[queries], np.where(new, 0, at), axis=1)
                near[queries] = np.where(new, train.start + at - neighbours, old)
                best[queries] = np.take_along_axis(scores, at, axis=1)
                advance(_len(queries) * _len(train))
    weights = np.square(np.maximum(best, _LEAST_COSINE), dtype=np.float64)
    ranked = [
        _rank(near[block], weights[block], dataset.train_relevance, k) for block in query_blocks
    ]
    return SearchResult(*(np.concatenate(part) for part in zip(*ranked, strict=True)))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _len(block: slice) -> int:
    return block.stop - block.start


def _top(scores: Float[np.ndarray, "q t"], count: int) -> Int[np.ndarray, "q n"]:
    """Returns the columns of the `count` largest scores, ascending; ties go to the first."""
    least = np.partition(scores, -count, axis=1)[:, -count, None]
    chosen = scores >= least
    tied = np.flatnonzero(np.count_nonzero(chosen, axis=1) > count)
    if len(tied):
        equal = scores[tied] == least[tied]
        vacant = count - np.count_nonzero(chosen[tied] & ~equal, axis=1)[:, None]
        chosen[tied] &= ~equal | (np.cumsum(equal, axis=1, dtype=np.int32) <= vacant)
    return np.flatnonzero(chosen).reshape(len(scores), count) % scores.shape[1]


def _rank(
    near: Int[np.ndarray, "q n"],
    weights: Float[np.ndarray, "q n"],
    relevance: sparse.csr_matrix,
    k: int,
) -> SearchResult:
    """Returns the k labels with the largest summed weights; short rows are padded with -1, -inf."""
    count, neighbours = near.shape
    by_neighbour = sparse.csr_matrix(
        (weights.reshape(-1), near.reshape(-1), np.arange(count + 1) * neighbours),
        shape=(count, relevance.shape[0]),
    )
    totals = (by_neighbour @ relevance).tocsr()
    rows = np.repeat(np.arange(count), np.diff(totals.indptr))
    order = np.lexsort((totals.indices, -totals.data, rows))
    rank = np.arange(len(order)) - totals.indptr[rows]  # `order` sorts within rows only.
    kept = rank < k
    ids = np.full((count, k), -1, np.int32)
    scores = np.full((count, k), -np.inf, np.float32)
    ids[rows[kept], rank[kept]] = totals.indices[order][kept]
    scores[rows[kept], rank[kept]] = totals.data[order][kept]
    return SearchResult(scores, ids)


def _text(evaluated: Items, training: Items) -> _Similarity:
    train_counts, vocabulary = _count_words(training.texts, None)
    evaluated_counts, _ = _count_words(evaluated.texts, vocabulary)
    occurrences = np.bincount(train_counts.indices, minlength=len(vocabulary))
    # Smoothed as if one more text contained every word.
    idf = np.log((1 + train_counts.shape[0]) / (1 + occurrences)) + 1
    train, test = (_unit_rows(counts, idf) for counts in (train_counts, evaluated_counts))

    def cosine(queries: slice, rows: slice) -> Float[np.ndarray, "q t"]:
        # Dense over the few words of these queries; several times faster than sparse times sparse.
        words = np.unique(test[queries].indices)
        return test[queries][:, words] @ train[rows][:, words].toarray().T.copy()

    return cosine


def _image(evaluated: Items, training: Items) -> _Similarity:
    def cosine(queries: slice, rows: slice) -> Float[np.ndarray, "q t"]:
        return _mean_images(evaluated, queries) @ _mean_images(training, rows).T

    return cosine


def _both(evaluated: Items, training: Items) -> _Similarity:
    text, image = _text(evaluated, training), _image(evaluated, training)
    return lambda queries, rows: (text(queries, rows) + image(queries, rows)) / 2


def _count_words(
    texts: Iterable[str], vocabulary: dict[str, int] | None
) -> tuple[sparse.csr_matrix, dict[str, int]]:
    """Returns the word counts [text, word] and the vocabulary.

    Args:
      texts: Texts to count.
      vocabulary: Column of each known word, other words are ignored; None: all words of the texts.
    """
    grow = vocabulary is None
    vocabulary = {} if grow else vocabulary
    indptr, columns, counts = [0], [], []
    for text in texts:
        for word, count in Counter(_WORD.findall(text.lower())).items():
            if grow:
                vocabulary.setdefault(word, len(vocabulary))
            if word in vocabulary:
                columns.append(vocabulary[word])
                counts.append(count)
        indptr.append(len(columns))
    shape = (len(indptr) - 1, len(vocabulary))
    return sparse.csr_matrix((np.array(counts, np.float64), columns, indptr), shape), vocabulary


def _unit_rows(counts: sparse.csr_matrix, idf: Float[np.ndarray, " w"]) -> sparse.csr_matrix:
    weighted = counts @ sparse.diags(idf)
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).reshape(-1))
    scale = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
    return (sparse.diags(scale) @ weighted).tocsr().astype(np.float32)


def _mean_images(items: Items, rows: slice) -> Float[np.ndarray, "n v"]:
    """Returns the unit mean embedding of each item's images; zero for an item without images."""
    if items.images is None:
        raise ValueError("kNN baseline by image: the data set has no images")
    offsets = np.asarray(items.images.offsets[rows.start : rows.stop + 1])
    values = np.asarray(items.images.values[offsets[0] : offsets[-1]], np.float32)
    has = np.diff(offsets) > 0
    sums = np.zeros((_len(rows), items.images.values.shape[1]), np.float32)
    if len(values):
        sums[has] = np.add.reduceat(values, offsets[:-1][has] - offsets[0], axis=0)
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.divide(sums, length, out=np.zeros_like(sums), where=length > 0)
