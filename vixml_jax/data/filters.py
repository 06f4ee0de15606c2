"""Filter pairs (query, label) that are never predicted, because the label is the query itself.

If queries and labels are of the same kind, such as products and products bought with them, the
label most similar to a query is the query itself. For its data sets, the XML repository publishes
pairs `query label` that count neither for nor against a prediction
(http://manikvarma.org/downloads/XC/XMLRepository.html, reciprocal-pair removal). This module
generates them for any data by the same rules.
"""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt64
from scipy import sparse

from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical
from vixml_jax.data.sources.xml_repository import to_csr
from vixml_jax.data.store import ranges
from vixml_jax.errors import InputError

# Reasons for a filter pair, and keys of the report in `dataset.json`.
ID, TEXT, RECIPROCAL = "id", "text", "reciprocal"
_RELEVANT_TEXTS, _SEPARATE_IDS = "answers", "numbers"
# Largest fraction of training pairs with equal texts that may be relevant. If more of them are, a
# label with the text of the query is a proper label (the tag "apple" of an image "apple").
_MAX_RELEVANT = 0.05
# Smallest fraction of pairs with equal ids that must have equal texts as well. If fewer do, queries
# and labels are numbered independently, and equal ids mean nothing.
_MIN_EQUAL_TEXTS = 0.5
# Largest number of pairs. Thousands of queries and labels with the same text ("untitled") are a
# fault of the data, and would exhaust memory.
_MAX_PAIRS = 100_000_000


def normalise(text: str) -> str:
    """The text without differences in case, width, Unicode composition and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_keys(items: RawItems) -> UInt64[np.ndarray, " n"]:
    """A 64-bit hash of the normalised text of each item; 0 for an empty text."""
    return chunk_keys(items.read_texts())


def chunk_keys(chunks: Iterable[list[str]]) -> UInt64[np.ndarray, " n"]:
    """A 64-bit hash of each normalised text in chunks of texts; 0 for an empty text."""
    empty = np.zeros(0, np.uint64)
    return np.concatenate([empty, *(keys(map(normalise, chunk)) for chunk in chunks)])


def id_keys(items: RawItems) -> UInt64[np.ndarray, " n"] | None:
    """A 64-bit hash of the id of each item; None if the source has no ids."""
    return None if items.ids is None else keys(items.ids)


def keys(texts: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """A 64-bit hash of each text, the same in every process; 0 for an empty text."""
    digests = (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
        if text
        else 0
        for text in texts
    )
    return np.fromiter(digests, np.uint64)


def same_keys(
    queries: UInt64[np.ndarray, " q"], labels: UInt64[np.ndarray, " l"], kind: str
) -> sparse.csr_matrix:
    """A matrix [q, l] of ones where the keys of query and label are equal and not 0.

    Args:
      queries, labels: Their keys.
      kind: What the keys are hashes of, for messages: 'id' or 'text'.

    Raises:
      InputError: If there are more than `_MAX_PAIRS` pairs.
    """
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    first = np.searchsorted(sorted_labels, queries, side="left")
    counts = np.searchsorted(sorted_labels, queries, side="right") - first
    counts[queries == 0] = 0
    if counts.sum() > _MAX_PAIRS:
        raise InputError(
            f"{counts.sum():,} pairs of a query and a label have the same {kind}, up to "
            f"{counts.max():,} for one query; expected at most {_MAX_PAIRS:,}: list the pairs in "
            "filter_labels_{train,test}.txt, or pass --filters=none"
        )
    return to_csr(counts, order[ranges(first, counts)], len(labels))


def make_filters(raw: RawDataset) -> tuple[RawDataset, dict[str, dict[str, int]]]:
    """Generates filter pairs for the splits whose source defines none.

    A pair (query, label) is filtered if both have the same id or the same normalised text. In valid
    and test it is also filtered if it is reciprocal: the label is, as an item, a training query,
    and the query is one of its labels. There are two exceptions. Equal texts are ignored if more
    than 5 % of the training pairs with equal texts are relevant. Equal ids are ignored if less than
    half of the pairs with equal ids have equal texts, because queries and labels are numbered
    independently.

    A filter pair counts neither for nor against a prediction, so it is removed from the relevant
    labels of valid and test. The relevance of training does not change.

    Returns:
      The data set, and a report for each split. The report has the number of pairs by reason ('id',
      'text' and 'reciprocal'; a pair with several reasons counts for the first), of all 'pairs', of
      'relevant' pairs among them, and of pairs that are not filtered although their texts
      ('answers') or their ids ('numbers') are equal. For a split with filter pairs in the source,
      the report has their number, 'given'.
    """
    splits = raw.splits
    report = {
        split: {"given": len(queries.filter)}
        for split, queries in splits.items()
        if queries.filter is not None
    }
    if len(report) == len(splits):
        return raw, report
    equal = _equal_keys(raw)
    ignored = {
        ID: _ids_are_separate(list(equal.values())),
        TEXT: _equal_texts_are_relevant(equal["train"][TEXT], raw.train.relevance),
    }
    same_item = {  # The pairs whose label is the query itself, by reason.
        split: {reason: matrix for reason, matrix in matrices.items() if not ignored[reason]}
        for split, matrices in equal.items()
    }
    changed = {}
    for split, queries in splits.items():
        if queries.filter is not None:
            continue
        reasons = dict(same_item[split])
        counts = {ID: 0, TEXT: 0, RECIPROCAL: 0, _RELEVANT_TEXTS: 0, _SEPARATE_IDS: 0}
        for reason, report_key in ((ID, _SEPARATE_IDS), (TEXT, _RELEVANT_TEXTS)):
            if ignored[reason] and reason in equal[split]:
                counts[report_key] = equal[split][reason].nnz
        if split != "train":
            reasons[RECIPROCAL] = _reciprocal(
                _any(same_item[split], queries.relevance.shape),
                raw.train.relevance,
                _any(same_item["train"], raw.train.relevance.shape),
            )
        total = sparse.csr_matrix(queries.relevance.shape, dtype=np.float32)
        for reason, matrix in reasons.items():
            union = _ones(total + matrix)
            counts[reason] = union.nnz - total.nnz
            total = union
        relevant = _both(total, queries.relevance)
        report[split] = {"pairs": total.nnz, **counts, "relevant": relevant.nnz}
        if split != "train" and relevant.nnz:
            queries = _without_labels(queries, relevant)
        pairs = np.empty((total.nnz, 2), np.int64)
        pairs[:, 0] = np.repeat(np.arange(total.shape[0]), np.diff(total.indptr))
        pairs[:, 1] = total.indices
        changed[split] = dataclasses.replace(queries, filter=pairs)
    return dataclasses.replace(raw, **changed), report


def given_filters(raw: RawDataset) -> tuple[RawDataset, dict[str, dict[str, int]]]:
    """The data set with the filter pairs of its source only, and their numbers as a report."""
    no_pairs = np.zeros((0, 2), np.int64)
    changed = {
        split: dataclasses.replace(
            queries, filter=no_pairs if queries.filter is None else queries.filter
        )
        for split, queries in raw.splits.items()
    }
    report = {split: {"given": len(queries.filter)} for split, queries in changed.items()}
    return dataclasses.replace(raw, **changed), report


def _equal_keys(raw: RawDataset) -> dict[str, dict[str, sparse.csr_matrix]]:
    """For each split, matrices of the pairs with equal ids (if both have ids) and equal texts."""
    label_keys = {ID: id_keys(raw.labels), TEXT: text_keys(raw.labels)}
    equal = {}
    for split, queries in raw.splits.items():
        query_keys = {ID: id_keys(queries.items), TEXT: text_keys(queries.items)}
        equal[split] = {
            reason: same_keys(query_keys[reason], labels, reason)
            for reason, labels in label_keys.items()
            if labels is not None and query_keys[reason] is not None
        }
    return equal


def _ids_are_separate(equal: list[dict[str, sparse.csr_matrix]]) -> bool:
    """Whether queries and labels are numbered independently, over all splits."""
    with_ids = [matrices for matrices in equal if ID in matrices]
    equal_texts = sum(_both(matrices[ID], matrices[TEXT]).nnz for matrices in with_ids)
    return equal_texts < _MIN_EQUAL_TEXTS * sum(matrices[ID].nnz for matrices in with_ids)


def _equal_texts_are_relevant(equal: sparse.csr_matrix, relevance: sparse.csr_matrix) -> bool:
    """Whether labels with the text of their training query are often relevant to it."""
    return _both(equal, relevance).nnz > _MAX_RELEVANT * equal.nnz


def _ones(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """A matrix of ones where the matrix is not zero, in canonical format."""
    matrix = sparse.csr_matrix(matrix)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    matrix.data[:] = 1.0
    return canonical(matrix)


def _any(reasons: dict[str, sparse.csr_matrix], shape: tuple[int, int]) -> sparse.csr_matrix:
    """The union of matrices of pairs."""
    total = sparse.csr_matrix(shape, dtype=np.float32)
    for matrix in reasons.values():
        total = total + matrix
    return _ones(total)


def _both(one: sparse.csr_matrix, other: sparse.csr_matrix) -> sparse.csr_matrix:
    """The intersection of two matrices of pairs."""
    return _ones(one.multiply(other))


def _reciprocal(
    same: sparse.csr_matrix, train: sparse.csr_matrix, same_train: sparse.csr_matrix
) -> sparse.csr_matrix:
    """Query -> the label that is the query -> its training queries -> the labels that are these.

    Args:
      same: The pairs of a split whose label is the query itself.
      train: Relevance of training.
      same_train: The same pairs of the training queries.
    """
    if not (same.nnz and same_train.nnz):  # Avoids transposing the relevance.
        return sparse.csr_matrix(same.shape, dtype=np.float32)
    return _ones((same @ train.T) @ same_train)


def _flat_indices(matrix: sparse.csr_matrix) -> Int[np.ndarray, " nnz"]:
    """Index of each entry in the flattened matrix, ascending."""
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    return rows * matrix.shape[1] + matrix.indices


def _without_labels(queries: RawQueries, removed: sparse.csr_matrix) -> RawQueries:
    """The queries without some of their relevant labels."""
    relevance = queries.relevance
    kept = np.ones(relevance.nnz, bool)
    kept[np.searchsorted(_flat_indices(relevance), _flat_indices(removed))] = False
    kept_before = np.concatenate([[0], np.cumsum(kept)])
    indptr = kept_before[relevance.indptr].astype(relevance.indptr.dtype)
    matrix = sparse.csr_matrix(
        (relevance.data[kept], relevance.indices[kept], indptr), shape=relevance.shape
    )
    return dataclasses.replace(
        queries,
        relevance=canonical(matrix),
        weights=None if queries.weights is None else queries.weights[kept],
    )


def describe(report: dict[str, dict[str, int]]) -> list[str]:
    """Lines on the number of filter pairs of each split and their reasons.

    Args:
      report: From `make_filters` or `given_filters`.
    """
    lines = []
    for split, counts in report.items():
        if counts.get("given"):
            lines.append(f"{split}: {counts['given']:,} filter pairs from the source")
        if counts.get(_RELEVANT_TEXTS):
            lines.append(
                f"{split}: {counts[_RELEVANT_TEXTS]:,} labels have the text of their query; they "
                "can be predicted, because such labels are often relevant in training"
            )
        if counts.get(_SEPARATE_IDS):
            lines.append(
                f"{split}: {counts[_SEPARATE_IDS]:,} labels have the id of their query but mostly "
                "another text; they can be predicted, because queries and labels seem to be "
                "numbered independently"
            )
        if counts.get("pairs"):
            reasons = ", ".join(
                f"{counts[reason]:,} {words}"
                for reason, words in (
                    (ID, "same id"),
                    (TEXT, "same text"),
                    (RECIPROCAL, "reciprocal"),
                )
                if counts[reason]
            )
            outcome = "kept for training" if split == "train" else "no longer counted"
            outcome = f", {outcome}" if counts["relevant"] else ""
            lines.append(
                f"{split}: {counts['pairs']:,} filter pairs generated ({reasons}); "
                f"{counts['relevant']:,} of them relevant{outcome}"
            )
    return lines
