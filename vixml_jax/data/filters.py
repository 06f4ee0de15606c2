"""Filter pairs: labels that are the query itself, which no one wants as an answer.

Where queries and labels are the same kind of thing (products and products bought with them), a
query's nearest label is itself. The XML repository publishes pairs `query label` for its sets that
count neither for nor against a prediction
(http://manikvarma.org/downloads/XC/XMLRepository.html, reciprocal-pair removal); here they are made
for any data, by the same rules.
"""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int, UInt64
from scipy import sparse

from vixml_jax.data.raw import RawDataset, RawItems, canonical
from vixml_jax.data.store import ranges

ID, TEXT, RECIPROCAL = "id", "text", "reciprocal"
# Of the pairs of equal texts in training, the share that may be relevant: above, an equal text is
# an answer (the tag "apple" of the picture "apple"), not the same thing.
_MOST_RELEVANT = 0.05
# Of the pairs of equal ids, the share that must have equal texts too: below, queries and labels are
# numbered each for themselves.
_LEAST_ALIKE = 0.5


def normalise(text: str) -> str:
    """The text without what does not tell items apart: case, width, accents' form, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_keys(items: RawItems) -> UInt64[np.ndarray, " n"]:
    """64 bits of the hash of each normalised text; 0 for an empty one."""
    return chunk_keys(items.read_texts())


def chunk_keys(chunks: Iterable[list[str]]) -> UInt64[np.ndarray, " n"]:
    """The same of texts that come a chunk at a time."""
    none = np.zeros(0, np.uint64)
    return np.concatenate([none, *(keys(map(normalise, chunk)) for chunk in chunks)])


def id_keys(items: RawItems) -> UInt64[np.ndarray, " n"] | None:
    """64 bits of the hash of each id; None where the source gives none."""
    return None if items.ids is None else keys(items.ids)


def keys(texts: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """64 bits of the hash of each text: equal texts have equal ones; 0 for an empty text."""
    digests = (
        hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() if text else bytes(8)
        for text in texts
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def same_keys(
    queries: UInt64[np.ndarray, " q"], labels: UInt64[np.ndarray, " l"]
) -> Int[np.ndarray, "f 2"]:
    """Pairs (query, label) of equal keys that are not 0, sorted."""
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    first = np.searchsorted(sorted_labels, queries, side="left")
    counts = np.searchsorted(sorted_labels, queries, side="right") - first
    counts[queries == 0] = 0
    rows = np.repeat(np.arange(len(queries)), counts)
    return np.stack([rows, order[ranges(first, counts)]], axis=1).astype(np.int64)


def make_filters(raw: RawDataset) -> tuple[RawDataset, dict[str, dict[str, int]]]:
    """The data set with filters on the splits that came without, and why each pair is in them.

    A pair (query, label) is filtered if both have the same id or the same normalised text; in
    valid and test also if it is reciprocal: if the label's item, as a query of training, has the
    query's item as a label. Equal texts do not count where training says of more than 5 % of such
    pairs that the label is relevant: there an equal text is an answer. Equal ids do not count where
    less than half of such pairs have equal texts: there queries and labels have their own numbers.

    Such a pair counts neither for nor against a prediction, so that it is no longer relevant in
    valid and test; the relevance of training is left as it is.

    Returns:
      The data set, and for each split the number of pairs by reason ('id', 'text', 'reciprocal',
      a pair with several under the first), 'pairs' of them all, 'answers' that stay though their
      texts are equal, 'numbers' that stay though their ids are, and 'relevant' ones; or 'given'
      pairs.
    """
    splits = raw.splits
    report = {
        name: {"given": len(found.filter)}
        for name, found in splits.items()
        if found.filter is not None
    }
    if len(report) == len(splits):
        return raw, report
    label_keys = {ID: id_keys(raw.labels), TEXT: text_keys(raw.labels)}
    same = {}
    for name, found in splits.items():
        query_keys = {ID: id_keys(found.items), TEXT: text_keys(found.items)}
        same[name] = {
            reason: _pair_matrix(same_keys(query_keys[reason], labels), found.relevance.shape)
            for reason, labels in label_keys.items()
            if labels is not None and query_keys[reason] is not None
        }
    alike = [_both(found[ID], found[TEXT]).nnz for found in same.values() if ID in found]
    are_numbers = sum(alike) < _LEAST_ALIKE * sum(
        found[ID].nnz for found in same.values() if ID in found
    )
    answers = _both(same["train"][TEXT], raw.train.relevance).nnz
    are_answers = answers > _MOST_RELEVANT * same["train"][TEXT].nnz
    changed = {}
    for name, found in splits.items():
        if found.filter is not None:
            continue
        reasons = dict(same[name])
        counts = {ID: 0, TEXT: 0, RECIPROCAL: 0, "answers": 0, "numbers": 0}
        if are_numbers:
            counts["numbers"] = reasons.pop(ID).nnz
        if are_answers:
            counts["answers"] = reasons.pop(TEXT).nnz
        if name != "train":
            reasons[RECIPROCAL] = _reciprocal(
                _any(reasons, found.relevance.shape),
                raw.train.relevance,
                _any(
                    {key: same["train"][key] for key in reasons if key in same["train"]},
                    raw.train.relevance.shape,
                ),
            )
        total = sparse.csr_matrix(found.relevance.shape, dtype=np.float32)
        for reason, matrix in reasons.items():
            joined = _ones(total + matrix)
            counts[reason] = joined.nnz - total.nnz
            total = joined
        both = _both(total, found.relevance)
        report[name] = {"pairs": total.nnz, **counts, "relevant": both.nnz}
        relevance, weights = found.relevance, found.weights
        if name != "train" and both.nnz:
            kept = ~_contains(total, relevance)
            if weights is not None:
                weights = weights[kept]
            relevance = _keep(relevance, kept)
        rows = np.repeat(np.arange(total.shape[0]), np.diff(total.indptr))
        pairs = np.stack([rows, total.indices], axis=1).astype(np.int64)
        changed[name] = dataclasses.replace(
            found, relevance=relevance, weights=weights, filter=pairs
        )
    return dataclasses.replace(raw, **changed), report


def given_filters(raw: RawDataset) -> tuple[RawDataset, dict[str, dict[str, int]]]:
    """The data set with no filter pairs on the splits that came without, and what was given."""
    none = np.zeros((0, 2), np.int64)
    changed = {
        name: dataclasses.replace(found, filter=none if found.filter is None else found.filter)
        for name, found in raw.splits.items()
    }
    report = {name: {"given": len(found.filter)} for name, found in changed.items()}
    return dataclasses.replace(raw, **changed), report


def _pair_matrix(pairs: Int[np.ndarray, "f 2"], shape: tuple[int, int]) -> sparse.csr_matrix:
    ones = np.ones(len(pairs), np.float32)
    return _ones(sparse.csr_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=shape))


def _ones(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """One where the matrix is not zero, in canonical form."""
    matrix = sparse.csr_matrix(matrix)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    matrix.data[:] = 1.0
    return canonical(matrix)


def _any(reasons: dict[str, sparse.csr_matrix], shape: tuple[int, int]) -> sparse.csr_matrix:
    total = sparse.csr_matrix(shape, dtype=np.float32)
    for matrix in reasons.values():
        total = total + matrix
    return _ones(total)


def _both(one: sparse.csr_matrix, other: sparse.csr_matrix) -> sparse.csr_matrix:
    return _ones(one.multiply(other))


def _reciprocal(
    same: sparse.csr_matrix, train: sparse.csr_matrix, same_train: sparse.csr_matrix
) -> sparse.csr_matrix:
    """Query -> its own label -> training queries that have it -> their own labels."""
    return _ones((same @ train.T) @ same_train)


def _contains(pairs: sparse.csr_matrix, relevance: sparse.csr_matrix) -> Bool[np.ndarray, " nnz"]:
    """Whether each one of the relevance is among the pairs."""
    width = np.int64(relevance.shape[1])
    rows = np.repeat(np.arange(relevance.shape[0], dtype=np.int64), np.diff(relevance.indptr))
    pair_rows = np.repeat(np.arange(pairs.shape[0], dtype=np.int64), np.diff(pairs.indptr))
    return np.isin(rows * width + relevance.indices, pair_rows * width + pairs.indices)


def _keep(relevance: sparse.csr_matrix, kept: np.ndarray) -> sparse.csr_matrix:
    """The ones that are kept."""
    before = np.concatenate([[0], np.cumsum(kept)])
    indptr = before[relevance.indptr].astype(relevance.indptr.dtype)
    return canonical(
        sparse.csr_matrix(
            (relevance.data[kept], relevance.indices[kept], indptr), shape=relevance.shape
        )
    )


def describe(report: dict[str, dict[str, int]]) -> list[str]:
    """A line a split that has filter pairs: how many, and why."""
    lines = []
    for split, counts in report.items():
        if counts.get("given"):
            lines.append(f"{split}: {counts['given']:,} filter pairs, as given")
        if counts.get("answers"):
            lines.append(
                f"{split}: {counts['answers']:,} labels have the text of their query; in training "
                "such labels are often relevant, so that they stay answers"
            )
        if counts.get("numbers"):
            lines.append(
                f"{split}: {counts['numbers']:,} labels have the id of their query but mostly "
                "another text; queries and labels are taken to be numbered each for themselves"
            )
        if counts.get("pairs"):
            why = ", ".join(
                f"{counts[reason]:,} {said}"
                for reason, said in (
                    (ID, "of the same id"),
                    (TEXT, "of the same text"),
                    (RECIPROCAL, "reciprocal"),
                )
                if counts[reason]
            )
            fate = "" if split == "train" else " and no longer count"
            lines.append(
                f"{split}: {counts['pairs']:,} filter pairs made ({why}); {counts['relevant']:,} "
                f"of them were relevant{fate}"
            )
    return lines
