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

from vixml_jax.data.sources.raw import RawDataset, RawItems, canonical
from vixml_jax.data.sources.xml_repository import to_csr
from vixml_jax.data.store import ranges
from vixml_jax.errors import InputError

ID, TEXT, RECIPROCAL = "id", "text", "reciprocal"
# Of the pairs of equal texts in training, the share that may be relevant: above, an equal text is
# an answer (the tag "apple" of the picture "apple"), not the same thing.
_MOST_RELEVANT = 0.05
# Of the pairs of equal ids, the share that must have equal texts too: below, queries and labels are
# numbered each for themselves.
_LEAST_ALIKE = 0.5
# Pairs that are made at most: thousands of queries and labels of one text ("untitled") are a fault
# of the data, and would take all memory.
_MOST_PAIRS = 100_000_000


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
        int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
        if text
        else 0
        for text in texts
    )
    return np.fromiter(digests, np.uint64)


def same_keys(
    queries: UInt64[np.ndarray, " q"], labels: UInt64[np.ndarray, " l"], what: str
) -> sparse.csr_matrix:
    """Ones at the pairs (query, label) of equal keys that are not 0, in canonical form.

    Args:
      queries, labels: Their keys.
      what: Keys are of, for messages.

    Raises:
      InputError: If there are more pairs than anyone could mean.
    """
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    first = np.searchsorted(sorted_labels, queries, side="left")
    counts = np.searchsorted(sorted_labels, queries, side="right") - first
    counts[queries == 0] = 0
    if counts.sum() > _MOST_PAIRS:
        raise InputError(
            f"{counts.sum():,} pairs of a query and a label have the same {what}, up to "
            f"{counts.max():,} of one query; expected {_MOST_PAIRS:,} at most to filter: give them "
            "in filter_labels_{train,test}.txt, or say --filters=none"
        )
    return to_csr(counts, order[ranges(first, counts)], len(labels))


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
            reason: same_keys(query_keys[reason], labels, reason)
            for reason, labels in label_keys.items()
            if labels is not None and query_keys[reason] is not None
        }
    alike = [_both(found[ID], found[TEXT]).nnz for found in same.values() if ID in found]
    are_numbers = sum(alike) < _LEAST_ALIKE * sum(
        found[ID].nnz for found in same.values() if ID in found
    )
    answers = _both(same["train"][TEXT], raw.train.relevance).nnz
    are_answers = answers > _MOST_RELEVANT * same["train"][TEXT].nnz
    off = {ID: are_numbers, TEXT: are_answers}
    own = {  # Whose labels that are the query itself are known, and why.
        name: {reason: matrix for reason, matrix in found.items() if not off[reason]}
        for name, found in same.items()
    }
    changed = {}
    for name, found in splits.items():
        if found.filter is not None:
            continue
        reasons = dict(own[name])
        counts = {ID: 0, TEXT: 0, RECIPROCAL: 0, "answers": 0, "numbers": 0}
        for reason, fate in ((ID, "numbers"), (TEXT, "answers")):
            if off[reason] and reason in same[name]:
                counts[fate] = same[name][reason].nnz
        if name != "train":
            reasons[RECIPROCAL] = _reciprocal(
                _any(own[name], found.relevance.shape),
                raw.train.relevance,
                _any(own["train"], raw.train.relevance.shape),
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
            kept = np.ones(relevance.nnz, bool)
            kept[np.searchsorted(_places(relevance), _places(both))] = False
            if weights is not None:
                weights = weights[kept]
            relevance = _keep(relevance, kept)
        pairs = np.empty((total.nnz, 2), np.int64)
        pairs[:, 0] = np.repeat(np.arange(total.shape[0]), np.diff(total.indptr))
        pairs[:, 1] = total.indices
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
    if not (same.nnz and same_train.nnz):  # Spares turning the relevance around.
        return sparse.csr_matrix(same.shape, dtype=np.float32)
    return _ones((same @ train.T) @ same_train)


def _places(matrix: sparse.csr_matrix) -> Int[np.ndarray, " nnz"]:
    """Row by row, the place of each one in the whole matrix; ascends."""
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    return rows * matrix.shape[1] + matrix.indices


def _keep(relevance: sparse.csr_matrix, kept: Bool[np.ndarray, " nnz"]) -> sparse.csr_matrix:
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
