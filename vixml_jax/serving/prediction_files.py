"""Predictions of the queries of a file, a line of JSON each; resumable, and shared by processes."""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import vixml_jax
from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.runtime import progress
from vixml_jax.serving import requests
from vixml_jax.serving.predictor import Predictor
from vixml_jax.serving.query_images import QueryImages
from vixml_jax.serving.requests import Query
from vixml_jax.storage import atomic, regular_files, resumable
from vixml_jax.storage.resumable import Place

_BLOCK = 1024  # Queries predicted together.
_SHOWN = 5  # Invalid rows, and notes, listed at the end.
_MAX_NOTES = 1000  # Different notes that are counted one by one.


def predict_rows(
    predictor: Predictor,
    query_images: QueryImages,
    block: Sequence[Query],
    *,
    k: int,
    min_score: float,
    never: Callable[[str], list[str]],
) -> Iterator[dict[str, Any]]:
    """Yields the output row of each query, in order.

    A row has `id` and `labels`; a note if something was ignored; `best_score` if no label reaches
    `min_score`; for an invalid query, `line` and `error`.

    Args:
      predictor: Of the run.
      query_images: Embeds the images of the queries.
      block: The queries.
      k: Maximum number of labels per query.
      min_score: Labels with a lower score are left out.
      never: Returns the ids of labels that must not be predicted, given the id of a query.
    """
    images, image_notes = query_images.embed(block)
    row_errors, notes, filters = [], [], []
    for query, vectors, note in zip(block, images, image_notes, strict=True):
        names = [*query.listed, *(never(query.id) if query.id else [])]
        unknown = [name for name in names if predictor.row_of(name) is None]
        error = query.error
        if not error and not query.text.strip() and vectors is None:
            error = note or "neither text nor image; expected one of them"
        if unknown:
            note = note or f"unknown label {unknown[0]!r} in the filter"
        row_errors.append(error)
        notes.append(note)
        filters.append([name for name in names if name not in unknown])
    valid = [i for i, error in enumerate(row_errors) if not error]
    texts = [block[i].text for i in valid]
    items = predictor.items(texts, [images[i] for i in valid])
    unknown_tokens = predictor.has_only_unknown_tokens(items)
    for i, is_unknown in zip(valid, unknown_tokens, strict=True):
        if is_unknown and images[i] is None:
            notes[i] = notes[i] or "the text has no token that the tokenizer knows"
    predictions = iter(
        predictor(
            texts,
            [images[i] for i in valid],
            k=k,
            never=[filters[i] for i in valid],
        )
        if valid
        else []
    )
    for query, error, note in zip(block, row_errors, notes, strict=True):
        row: dict[str, Any] = {"id": query.id, "labels": []}
        if error:
            row |= {"line": query.line, "error": error}
        else:
            found = next(predictions)
            row["labels"] = [label._asdict() for label in found if label.score >= min_score]
            if found and not row["labels"]:
                row["best_score"] = found[0].score
            row |= {"note": note} if note else {}
        yield row


class Request(NamedTuple):
    """What is predicted of which queries.

    Attributes:
      path: File of the queries.
      k: Maximum number of labels per query.
      min_score: Labels with a lower score are left out.
      filters: File of labels that are never predicted; empty: there is none.
      place: Where predictions are written, and which process of how many this is: process i of n
        predicts every n-th block of queries, from block i on.
      resume: Whether to keep what a stopped process has predicted, and to go on with it.
      reading: All else that predictions depend on: how queries are read and labels searched.
    """

    path: str
    k: int
    min_score: float
    filters: str
    place: Place
    resume: bool
    reading: Sequence[object]


def predict_file(
    predictor: Predictor, query_images: QueryImages, rows: Iterator[Query], request: Request
) -> None:
    """Predicts the labels of the queries of a file, and writes them block by block.

    Args:
      predictor: Of the run.
      query_images: Embeds the images of the queries.
      rows: The queries.
      request: See `Request`.

    Raises:
      InputError: If none of the rows is a valid query, if what a stopped process has predicted is
        damaged, or if the disk is full.
    """
    k, place, min_score = request.k, request.place, request.min_score
    if k > predictor.num_labels:
        print(f"--k={k}: the run has only {predictor.num_labels} labels; all of them are ranked")
        k = predictor.num_labels
    filters = requests.read_filters(request.filters) if request.filters else {}
    tally = _Tally(filters)
    of = _digest(predictor, request) if request.resume else ""
    if of and (done := resumable.finished(place, of)):
        print(f"{place.part}: {done.lines} queries were predicted before")
        _note_others(place, of)
        return
    with (
        errors.writing(f"--out={place.path}"),
        _output(place, of) as (out, kept, num_kept),
        progress.track("queries", _count_lines(request.path), unit="query") as advance,
    ):
        for number, line in enumerate(kept, 1):
            try:
                tally.add(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(
                    f"{place.unfinished}, line {number}: damaged; remove the file, and its queries "
                    "are predicted anew"
                ) from None
        blocks = requests.in_blocks(rows, _BLOCK)
        own = itertools.islice(blocks, place.index, None, place.count)
        for block in _after(own, num_kept):
            for row in predict_rows(
                predictor,
                query_images,
                block,
                k=k,
                min_score=min_score,
                never=lambda name: filters.get(name, []),
            ):
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                tally.add(row)
            out.flush()
            advance(len(block))
        # A part of several may have few rows, or none.
        if tally.num_errors == tally.count and place.count == 1:
            raise InputError(
                f"{request.path}: none of the {tally.count} rows is a valid query; the first "
                f"error is: {tally.errors[0][1]}"
            )
    for line in tally.lines(place.part):
        print(line)
    if tally.without_query and place.count == 1:  # A part has not all queries.
        print(
            f"{request.filters}: {len(tally.without_query)} of {len(filters)} query ids are of no "
            f"query, such as {min(tally.without_query)[:40]!r}"
        )
    predicted = tally.count - tally.num_errors
    before = f", {num_kept} of them before" if num_kept else ""
    if tally.count:
        found = f"{predicted} of {tally.count} queries predicted{before}, up to {k} labels each"
    else:
        found = "no queries: the other processes predict all of them"
    print(f"{found}: {place.part}")
    if of:
        _note_others(place, of)


def _note_others(place: Place, of: str) -> None:
    """Says which parts do not belong with this one, as a process had other flags, say."""
    if others := resumable.of_something_else(place, of):
        print(
            f"{', '.join(others[:_SHOWN])}: predicted with other flags, labels or queries than "
            f"{place.part}, so there is no manifest yet; run the other processes again"
        )


@contextlib.contextmanager
def _output(place: Place, of: str) -> Iterator[tuple[BinaryIO, Iterator[bytes], int]]:
    """Yields the file to write to, the lines that an earlier process wrote to it, and their number.

    Args:
      place: Of the file.
      of: Digest of all that predictions depend on; empty: nothing is gone on with.
    """
    if of:
        with resumable.writing(place, of) as unfinished:
            yield unfinished.file, unfinished.kept(), unfinished.num_kept
        return
    with atomic.file(place.part) as temporary, open(temporary, "wb") as out:
        yield out, iter(()), 0


def _after(blocks: Iterator[Sequence[Query]], count: int) -> Iterator[Sequence[Query]]:
    """Yields the blocks without the first `count` queries."""
    for block in blocks:
        if count < len(block):
            yield block[count:]
        count = max(0, count - len(block))


def _digest(predictor: Predictor, request: Request) -> str:
    """A digest of what predictions depend on: model, labels, queries and settings."""
    about, updates = predictor.artifacts.about, predictor.updates
    return resumable.digest_of(
        vixml_jax.__version__,
        [about.step, about.content_hash, predictor.model_digest],
        # Labels may be taken back and added again, with other texts and examples.
        [updates.ids, updates.texts, updates.removed.tolist()],
        hashlib.sha256(updates.vectors.tobytes()).hexdigest(),
        [predictor.fusion, predictor.mixing],
        [request.k, repr(request.min_score), request.place.count, *request.reading],
        files=tuple(path for path in (request.path, request.filters) if path),
    )


class _Tally:
    """Counts what is not as expected in the rows of a file of predictions.

    Attributes:
      count: Rows.
      num_errors: Rows of invalid queries.
      errors: Line and error of the first of them.
      num_below: Queries without a label of at least --min_score.
      below: The lowest and highest of their best scores.
      without_query: Ids of queries in `--filters` that no row has.
    """

    def __init__(self, filtered: Iterable[str]) -> None:
        self.without_query = {*filtered}
        self.count = self.num_errors = 0
        self.errors: list[tuple[int, str]] = []
        self.num_below, self.below = 0, (math.inf, -math.inf)
        self._notes: collections.Counter[str] = collections.Counter()

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row of `predict_rows`."""
        self.count += 1
        self.without_query.discard(row["id"])
        if "error" in row:
            self.num_errors += 1
            self.errors += [(row["line"], row["error"])][: _SHOWN - len(self.errors)]
        if "best_score" in row:
            low, high = self.below
            self.num_below += 1
            self.below = min(low, row["best_score"]), max(high, row["best_score"])
        if "note" in row:
            is_counted = row["note"] in self._notes or len(self._notes) < _MAX_NOTES
            self._notes[row["note"] if is_counted else "other notes"] += 1

    def lines(self, path: str) -> list[str]:
        """Lines about the first errors and the most frequent notes.

        Args:
          path: Of the file of predictions.
        """
        lines = [f"invalid query in line {line}: {error}" for line, error in self.errors]
        if self.num_errors > len(self.errors):
            more = self.num_errors - len(self.errors)
            lines.append(f'and {more} more, each with its "error" in {path}')
        shown = self._notes.most_common(_SHOWN)
        lines += [f"note of {_queries(count)}: {note}" for note, count in shown]
        if more := self._notes.total() - sum(count for _, count in shown):
            lines.append(f'notes of {more} more, each with its "note" in {path}')
        if self.num_below:
            low, high = self.below
            lines.append(
                f"{_queries(self.num_below)} without labels: none reaches --min_score; the best "
                f"scores are {low:.2g} to {high:.2g}"
            )
        return lines


def _queries(count: int) -> str:
    return "1 query" if count == 1 else f"{count:,} queries"


def _count_lines(path: str) -> int | None:
    """Approximate number of rows of a plain text table; None: not known without parsing it."""
    if not path.endswith((".jsonl", ".ndjson", ".json", ".csv", ".tsv")):
        return None
    with contextlib.suppress(InputError), regular_files.open_binary(path) as file:
        blocks = iter(functools.partial(file.read, 1 << 20), b"")
        return sum(block.count(b"\n") for block in blocks)
    return None
