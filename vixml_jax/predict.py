"""The door that answers: labels for new queries; labels added to a run and removed from it."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import config as config_lib
from vixml_jax import errors, prepare
from vixml_jax.augmentation import neighbors
from vixml_jax.config import SearchConfig
from vixml_jax.data.images import download
from vixml_jax.data.sources.columns import Columns
from vixml_jax.errors import InputError
from vixml_jax.runtime import compilation_cache, host_memory
from vixml_jax.serving import cold_start, label_updates, requests
from vixml_jax.serving.predictor import Predictor
from vixml_jax.serving.requests import Query
from vixml_jax.storage import atomic, object_store

BLOCK = 1024  # Queries answered together.
_TOLD = 5  # Faults shown at the end.


class Pictures:
    """Embeds the image files and urls that queries name, as the run's data were embedded."""

    def __init__(self, predictor: Predictor, directory: str, dtype: str, allow_private: bool):
        """Takes who read the run's pictures from its answers.

        Args:
          predictor: Of the run.
          directory: Where embeddings are kept, so that a file is embedded once.
          dtype: Of the vision model.
          allow_private: Whether urls may be of private addresses.
        """
        model, _, aspect = predictor.answers.about["images"].rpartition(", ")
        self._width = predictor.image_width
        self._finder = None
        if model and self._width:
            self._finder = prepare.ImageFinder(
                model,
                directory,
                keep_aspect=aspect == "aspect kept",
                batch=16,
                dtype=dtype,
                bounds=download.DownloadSettings(allow_private=allow_private),
            )

    def of(self, asked: Sequence[Query]) -> tuple[list[np.ndarray | None], list[str]]:
        """Embeddings of each query's pictures, and what is to be said of them; empty: nothing."""
        found: list[np.ndarray | None] = [query.embeddings for query in asked]
        said = [""] * len(asked)
        for i, query in enumerate(asked):
            if (query.pictures or found[i] is not None) and not self._width:
                found[i], said[i] = None, "pictures are not read: this run was trained without"
            elif found[i] is not None and found[i].shape[1] != self._width:
                said[i] = (
                    f"the picture's embedding is {found[i].shape[1]} wide, expected {self._width}"
                )
                found[i] = None
            elif query.pictures and self._finder is None:
                said[i] = (
                    "picture files are not read: the run's data came with embeddings; give such"
                )
        named = [i for i, query in enumerate(asked) if query.pictures and not said[i]]
        if named and self._finder is not None:
            embedded = self._finder.embed("--queries", [asked[i].pictures for i in named])
            for i, rows in zip(named, embedded.rows, strict=True):
                found[i] = np.asarray(embedded.vectors[rows[rows >= 0]], np.float16)
                broken = [p for p in asked[i].pictures if p in self._finder.broken]
                if broken:
                    said[i] = f"picture {broken[0]}: {self._finder.broken[broken[0]]}"
        return [x if x is not None and len(x) else None for x in found], said


def answer(
    predictor: Predictor,
    pictures: Pictures,
    block: Sequence[Query],
    *,
    k: int,
    min_score: float,
    never: Callable[[str], list[str]],
) -> Iterator[dict[str, Any]]:
    """What is written of each query, in order.

    Args:
      predictor: That answers.
      pictures: That reads their pictures.
      block: The queries.
      k, min_score: See `Predictor`.
      never: Ids of labels that are not to be predicted, by the query's id.
    """
    images, said = pictures.of(block)
    faults, notes, banned = [], [], []
    for query, vectors, note in zip(block, images, said, strict=True):
        names = [*query.listed, *(never(query.id) if query.id else [])]
        unknown = [name for name in names if predictor.row_of(name) is None]
        fault = query.fault
        if not fault and not query.text.strip() and vectors is None:
            fault = note or "neither text nor picture: nothing to search with"
        if unknown:
            note = note or f"filter: {unknown[0]!r} is not among the labels"
        faults.append(fault)
        notes.append(note)
        banned.append([name for name in names if name not in unknown])
    fine = [i for i, fault in enumerate(faults) if not fault]
    texts = [block[i].text for i in fine]
    items = predictor.items(texts, [images[i] for i in fine])
    for i, strange in zip(fine, predictor.unknown(items), strict=True):
        if strange and images[i] is None:
            notes[i] = notes[i] or "no word of it is known"
    found = iter(
        predictor(
            texts,
            [images[i] for i in fine],
            k=k,
            min_score=min_score,
            never=[banned[i] for i in fine],
        )
        if fine
        else []
    )
    for query, fault, note in zip(block, faults, notes, strict=True):
        row: dict[str, Any] = {"id": query.id, "labels": []}
        if fault:
            row |= {"line": query.line, "error": fault}
        else:
            row["labels"] = [one._asdict() for one in next(found)]
            row |= {"note": note} if note else {}
        yield row


def read_filters(path: str) -> dict[str, list[str]]:
    """Labels that are never predicted, by the id of the query; of lines "query label".

    Raises:
      InputError: If a line is none.
    """
    found: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                parts = line.rstrip("\n").split("\t") if "\t" in line else line.split()
                if len(parts) != 2:
                    raise InputError(
                        f"{path}, line {number}: {line.strip()[:40]!r}, expected the id of a query "
                        "and of a label, with a tab or a space between"
                    )
                found.setdefault(parts[0], []).append(parts[1])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--filters={path}: {error}") from None
    return found


def predict(predictor: Predictor, pictures: Pictures, values: flags.FlagValues) -> None:
    """Answers the queries of a file, a block at a time, and writes as it goes."""
    import tqdm

    k = values.k
    if k > predictor.num_labels:
        print(f"--k={k}: the run has {predictor.num_labels} labels; all of them are ranked")
        k = predictor.num_labels
    filters = read_filters(values.filters) if values.filters else {}
    rows = requests.read(
        values.queries,
        _columns(values),
        listed="filter",
        encoding=values.encoding,
    )
    count, bad, told = 0, 0, []
    with (
        errors.writing(f"--out={values.out}"),
        atomic.file(values.out) as temporary,
        open(temporary, "w", encoding="utf-8") as out,
        tqdm.tqdm(desc="queries", total=_count_lines(values.queries), disable=None) as bar,
    ):
        for block in requests.in_blocks(rows, BLOCK):
            block = [_resolved(query, values.queries) for query in block]
            for row in answer(
                predictor,
                pictures,
                block,
                k=k,
                min_score=-np.inf if values.min_score is None else values.min_score,
                never=lambda name: filters.get(name, []),
            ):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
                if "error" in row:
                    bad += 1
                    told += [(row["line"], row["error"])][: _TOLD - len(told)]
            bar.update(len(block))
        if bad == count:
            raise InputError(
                f"{values.queries}: none of {count} rows can be answered: {told[0][1]}"
            )
    for line, fault in told:
        print(f"not answered: line {line}: {fault}")
    if bad > _TOLD:
        print(f'and {bad - _TOLD} more, each with its "error" in {values.out}')
    print(f"{count - bad} of {count} queries answered, up to {k} labels each: {values.out}")


def _resolved(query: Query, table: str) -> Query:
    """The query with the paths of its pictures as seen from here."""
    directory = os.path.dirname(os.path.abspath(table))
    named = [p if download.is_url(p) else os.path.join(directory, p) for p in query.pictures]
    return query._replace(pictures=named)


def _count_lines(path: str) -> int | None:
    """Rows of a plain text table, about; None: not known without reading it all."""
    if not path.endswith((".jsonl", ".ndjson", ".json", ".csv", ".tsv")):
        return None
    with contextlib.suppress(OSError), open(path, "rb") as file:
        blocks = iter(functools.partial(file.read, 1 << 20), b"")
        return sum(block.count(b"\n") for block in blocks)
    return None


def _columns(values: flags.FlagValues) -> Columns:
    return Columns(
        id=values.id_column,
        text=values.text,
        image=values.image_column,
        embedding=values.embedding_column,
    )


def _read_labels(path: str, values: flags.FlagValues) -> list[Query]:
    """Rows of a table of labels, each with an id of its own.

    Raises:
      InputError: At the first row that is wrong.
    """
    found, first = [], {}
    rows = requests.read(
        path, _columns(values), listed="examples", encoding=values.encoding, named=True
    )
    for row in rows:
        if row.fault:
            raise InputError(row.fault)
        if not row.id:
            raise InputError(f"{path}, line {row.line}: no id; expected one of each label")
        if row.id in first:
            raise InputError(
                f"{path}, line {row.line}: label {row.id!r} is there already, in line "
                f"{first[row.id]}; expected each once"
            )
        first[row.id] = row.line
        found.append(_resolved(row, path))
    return found


def add_labels(
    predictor: Predictor, pictures: Pictures, path: str, values: flags.FlagValues
) -> None:
    """Adds the labels of a table; see `serving.placing`."""
    labels = _read_labels(path, values)
    for label in labels:
        if predictor.row_of(label.id) is not None:
            raise InputError(
                f"{path}, line {label.line}: label {label.id!r} is in the run already; remove it "
                "first by --remove_labels, or choose another id"
            )
    images, said = pictures.of(labels)
    for label, vectors, fault in zip(labels, images, said, strict=True):
        if vectors is None and not label.text.strip():
            why = fault or "neither text nor picture"
            raise InputError(f"{path}, line {label.line}: {why}: nothing to place the label by")
        if fault:
            print(f"line {label.line}: {fault}; it is placed without")
    texts = [label.text for label in labels]
    examples = [[query for query in label.listed if query.strip()] for label in labels]
    vectors = cold_start.place(predictor, texts, images, examples)
    with errors.writing(f"--workdir={predictor.workdir}"):
        step = label_updates.add(
            predictor.workdir, predictor.answers, [x.id for x in labels], texts, vectors
        )
    predictor.refresh()
    taught = sum(map(bool, examples))
    print(
        f"{len(labels)} labels added, {taught} of them with example queries; the run has "
        f"{predictor.num_labels} now: {step}; --undo takes it back"
    )


def remove_labels(predictor: Predictor, path: str) -> None:
    """Removes the labels whose ids a file has, one a line."""
    rows: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                name = line.rstrip("\r\n")
                row = predictor.row_of(name)
                if name and row is None:
                    raise InputError(f"{path}, line {number}: the run has no label {name[:60]!r}")
                if row is not None:
                    rows[name] = row
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--remove_labels={path}: {error}") from None
    if not rows:
        raise InputError(f"--remove_labels={path}: empty; expected ids of labels, one a line")
    if len(rows) == predictor.num_labels:
        raise InputError(f"--remove_labels={path}: names all labels of the run; none would be left")
    with errors.writing(f"--workdir={predictor.workdir}"):
        step = label_updates.remove(predictor.workdir, predictor.answers, [*rows], [*rows.values()])
    predictor.refresh()
    print(
        f"{len(rows)} labels removed; the run has {predictor.num_labels} now: {step}; --undo "
        "takes it back"
    )


def list_changes(workdir: str) -> None:
    """Prints what was added and removed."""
    for path in label_updates.steps(workdir):
        about = label_updates.describe(path)
        names = ", ".join(about["ids"][:3]) + (", ..." if len(about["ids"]) > 3 else "")
        print(f"{path}: {about['kind']} {len(about['ids'])} labels: {names}")
    print(f"{workdir}: labels were changed {len(label_updates.steps(workdir))} times")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory that train wrote")
    told = [
        name
        for name in ("queries", "add_labels", "remove_labels", "undo", "list_changes")
        if values[name].value
    ]
    if len(told) != 1:
        raise InputError(
            "expected one of --queries=FILE --out=FILE, --add_labels=FILE, --remove_labels=FILE, "
            f"--undo, --list_changes; found {', '.join('--' + name for name in told) or 'none'}"
        )
    if values.queries and not values.out:
        raise InputError("--out: missing; expected a file to write, answers.jsonl say")
    for name in ("queries", "add_labels", "remove_labels", "filters"):
        if values[name].value and not os.path.isfile(values[name].value):
            raise InputError(f"--{name}={values[name].value}: no such file")
    both = values.queries and os.path.exists(values.out)
    if both and os.path.samefile(values.queries, values.out):
        raise InputError(f"--out={values.out}: is --queries; answers would take their place")
    if values.list_changes:
        list_changes(values.workdir)
        return
    if values.undo:
        with errors.writing(f"--workdir={values.workdir}"):
            about = label_updates.undo(values.workdir)
        print(f"taken back: {about['kind']} {len(about['ids'])} labels")
        return
    host_memory.keep_freed_pages()
    compilation_cache.keep_in(values.compile_cache)
    predictor = Predictor.load(
        values.workdir,
        search=values.search,
        searched=config_lib.group_from_flags("search", SearchConfig, values),
        values=values,
        data=values.data,
        data_cache=values.data_cache,
        mesh=values.mesh,
        warm=False,
    )
    pictures = Pictures(
        predictor,
        os.path.join(values.workdir, "pictures"),
        values.image_dtype,
        values.allow_private_hosts,
    )
    if values.queries:
        predict(predictor, pictures, values)
    elif values.add_labels:
        add_labels(predictor, pictures, values.add_labels, values)
    else:
        remove_labels(predictor, values.remove_labels)


def define_flags() -> None:
    """The flags of this door; all else comes from the run directory."""
    text = flags.DEFINE_string
    text("workdir", "", "Run directory that train wrote.")
    text("queries", "", "Queries to answer: csv, tsv, jsonl (.gz, .zst) or parquet.")
    text("out", "", "Answers, a line of JSON a query, in the order of the queries.")
    flags.DEFINE_integer("k", 10, "Labels a query at most.", lower_bound=1)
    flags.DEFINE_float("min_score", None, "Labels below this score are left out.")
    text(
        "filters",
        "",
        'Labels never predicted: lines "query label", by their ids. A column "filter" of the '
        "queries does the same.",
    )
    text(
        "add_labels",
        "",
        'Table of labels to add: id, text, pictures as of queries, and a list "examples" of texts '
        "of queries that each is right for.",
    )
    text("remove_labels", "", "Labels to remove: their ids, one a line.")
    flags.DEFINE_boolean("undo", False, "Take back what was added or removed last.")
    flags.DEFINE_boolean("list_changes", False, "Show what was added and removed.")
    text("id_column", "", "Column of the id; empty: guessed, else the line.")
    text("text", "", "Column of the text, or a template: '{title} by {brand}'; empty: guessed.")
    text("image_column", "", "Column of image paths or urls, '|' between several; empty: guessed.")
    text("embedding_column", "", "Column of the pictures' embeddings; empty: guessed.")
    text("encoding", "utf-8", "Of the texts in csv and jsonl.")
    flags.DEFINE_enum("image_dtype", "float32", ["float32", "bfloat16"], "Of the vision model.")
    flags.DEFINE_boolean(
        "allow_private_hosts", False, "Download pictures from private addresses too."
    )
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "How labels are searched.")
    text("data", "", "Prepared data, if they have moved; read once, to make what answers need.")
    text("mesh", "", "Mesh to answer on, if not as trained: fsdp:-1 fits any devices.")
    neighbors.define_flags()
    config_lib.define_group("search", SearchConfig)
    compilation_cache.define_flag()
    object_store.define_flag()


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
