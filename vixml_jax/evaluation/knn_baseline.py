"""The learning-free baseline: a vote of the nearest training queries, by text, pictures or both."""

import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.data.store import Items, PreparedDataset
from vixml_jax.structs import SearchResult

_WORD = re.compile(r"\w+")
# A neighbour counts at least as if it had this cosine, so that a query like none gets an answer.
_LEAST_COSINE = 1e-3

# Cosines of rows of the queries judged with rows of the training queries: [q, t].
_Similarity = Callable[[slice, slice], Float[np.ndarray, "q t"]]


def vote(
    dataset: PreparedDataset,
    *,
    split: str = "test",
    by: str = "text",
    k: int = 100,
    neighbours: int = 20,
    query_block: int = 1024,
    train_block: int = 4096,
) -> SearchResult:
    """The labels of the nearest training queries of each query, by summed squared cosine.

    Ties go to the training query, and to the label, that comes first.

    Args:
      dataset: Training queries with labels, and those judged.
      split: Which these are: 'test' or 'valid'.
      by: 'text' (TF-IDF of the words), 'picture' (mean embedding), or 'both' (mean of the cosines).
      k: Labels kept of each query.
      neighbours: Training queries that vote.
      query_block, train_block: Rows compared at a time; they bound memory alone.
    """
    import tqdm

    judged = getattr(dataset, split)
    cosine = {"text": _text, "picture": _picture, "both": _both}[by](judged, dataset.train)
    num_queries, num_train = len(judged), len(dataset.train)
    neighbours = min(neighbours, num_train)
    near = np.zeros((num_queries, neighbours), np.int64)
    best = np.full((num_queries, neighbours), -np.inf, np.float32)
    train_blocks = _slices(num_train, train_block)
    query_blocks = _slices(num_queries, query_block)
    total = len(train_blocks) * len(query_blocks)
    with tqdm.tqdm(total=total, desc=f"vote, {by}", delay=1, disable=None) as bar:
        for train in train_blocks:
            for queries in query_blocks:
                # Rounded, so that equal texts tie whatever order their words are summed in.
                scores = np.round(cosine(queries, train), 5)
                scores = np.concatenate([best[queries], scores], axis=1)
                at = _top(scores, neighbours)
                new = at >= neighbours
                old = np.take_along_axis(near[queries], np.where(new, 0, at), axis=1)
                near[queries] = np.where(new, train.start + at - neighbours, old)
                best[queries] = np.take_along_axis(scores, at, axis=1)
                bar.update()
    weights = np.square(np.maximum(best, _LEAST_COSINE), dtype=np.float64)
    found = [
        _rank(near[block], weights[block], dataset.train_relevance, k) for block in query_blocks
    ]
    return SearchResult(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _len(block: slice) -> int:
    return block.stop - block.start


def _top(scores: Float[np.ndarray, "q t"], count: int) -> Int[np.ndarray, "q n"]:
    """Columns of the largest scores, in ascending order; of equal ones the first."""
    least = np.partition(scores, -count, axis=1)[:, -count, None]
    chosen = scores >= least
    tied = np.flatnonzero(np.count_nonzero(chosen, axis=1) > count)
    if len(tied):
        equal = scores[tied] == least[tied]
        room = count - np.count_nonzero(chosen[tied] & ~equal, axis=1)[:, None]
        chosen[tied] &= ~equal | (np.cumsum(equal, axis=1, dtype=np.int32) <= room)
    return np.flatnonzero(chosen).reshape(len(scores), count) % scores.shape[1]


def _rank(
    near: Int[np.ndarray, "q n"],
    weights: Float[np.ndarray, "q n"],
    relevance: sparse.csr_matrix,
    k: int,
) -> SearchResult:
    """The labels with most weight, absent ones padded."""
    count, neighbours = near.shape
    votes = sparse.csr_matrix(
        (weights.reshape(-1), near.reshape(-1), np.arange(count + 1) * neighbours),
        shape=(count, relevance.shape[0]),
    )
    totals = (votes @ relevance).tocsr()
    rows = np.repeat(np.arange(count), np.diff(totals.indptr))
    order = np.lexsort((totals.indices, -totals.data, rows))
    place = np.arange(len(order)) - totals.indptr[rows]  # Rows stay where they are in the order.
    kept = place < k
    ids = np.full((count, k), -1, np.int32)
    scores = np.full((count, k), -np.inf, np.float32)
    ids[rows[kept], place[kept]] = totals.indices[order][kept]
    scores[rows[kept], place[kept]] = totals.data[order][kept]
    return SearchResult(scores, ids)


def _text(judged: Items, training: Items) -> _Similarity:
    train_counts, vocabulary = _count_words(training.texts, None)
    judged_counts, _ = _count_words(judged.texts, vocabulary)
    occurrences = np.bincount(train_counts.indices, minlength=len(vocabulary))
    # Smoothed, as if one more text held every word.
    idf = np.log((1 + train_counts.shape[0]) / (1 + occurrences)) + 1
    train, found = (_unit_rows(counts, idf) for counts in (train_counts, judged_counts))

    def cosine(queries: slice, rows: slice) -> Float[np.ndarray, "q t"]:
        # Dense in the few words of these queries: several times faster than sparse by sparse.
        words = np.unique(found[queries].indices)
        return found[queries][:, words] @ train[rows][:, words].toarray().T.copy()

    return cosine


def _picture(judged: Items, training: Items) -> _Similarity:
    def cosine(queries: slice, rows: slice) -> Float[np.ndarray, "q t"]:
        return _mean_pictures(judged, queries) @ _mean_pictures(training, rows).T

    return cosine


def _both(judged: Items, training: Items) -> _Similarity:
    text, picture = _text(judged, training), _picture(judged, training)
    return lambda queries, rows: (text(queries, rows) + picture(queries, rows)) / 2


def _count_words(
    texts: Iterable[str], vocabulary: dict[str, int] | None
) -> tuple[sparse.csr_matrix, dict[str, int]]:
    """How often each word occurs in each text; words unknown to a given vocabulary are left out."""
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


def _mean_pictures(items: Items, rows: slice) -> Float[np.ndarray, "n v"]:
    """Direction of the mean embedding of each item's pictures; zero where it has none."""
    if items.images is None:
        raise ValueError("the data set has no pictures to vote by")
    offsets = np.asarray(items.images.offsets[rows.start : rows.stop + 1])
    values = np.asarray(items.images.values[offsets[0] : offsets[-1]], np.float32)
    has = np.diff(offsets) > 0
    sums = np.zeros((_len(rows), items.images.values.shape[1]), np.float32)
    if len(values):
        sums[has] = np.add.reduceat(values, offsets[:-1][has] - offsets[0], axis=0)
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.divide(sums, length, out=np.zeros_like(sums), where=length > 0)
