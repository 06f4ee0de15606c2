"""Predicts labels for the queries of a file; adds labels to a run, or removes some.

python -m vixml_jax.predict --workdir=runs/shop --queries=queries.csv --out=predictions.jsonl
python -m vixml_jax.predict --workdir=runs/shop --add_labels=new.csv
python -m vixml_jax.predict --workdir=runs/shop --undo
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from absl import flags

from vixml_jax import command_line, errors, run_data
from vixml_jax import workdir as workdir_lib
from vixml_jax.data.images import download
from vixml_jax.data.sources.columns import Columns
from vixml_jax.errors import InputError
from vixml_jax.image_encoding import encoder
from vixml_jax.image_encoding.finder import ImageFinder
from vixml_jax.runtime import compilation_cache, host_memory
from vixml_jax.serving import (
    cold_start,
    label_updates,
    prediction_files,
    predictor_flags,
    requests,
)
from vixml_jax.serving.predictor import Predictor
from vixml_jax.serving.query_images import QueryImages
from vixml_jax.serving.requests import Query
from vixml_jax.storage import regular_files, resumable
from vixml_jax.storage.resumable import Place

COMMON_FLAGS = (
    "workdir", "queries", "out", "k", "min_score", "filters", "text", "add_labels",
    "remove_labels", "undo", "list_changes", "search",
)  # fmt: skip
_ACTIONS = ("queries", "add_labels", "remove_labels", "undo", "list_changes")
_DIALECT = ("encoding", "delimiter", "quotechar")
_READING = ("id_column", "text", "image_column", "embedding_column", *_DIALECT)


def _options(values: flags.FlagValues) -> requests.Options:
    """How tables are read: as the flags say, else as the tables of the run's data were read."""
    given = Columns(
        id=values.id_column,
        text=values.text,
        image=values.image_column,
        embedding=values.embedding_column,
    )
    dialect = {name: values[name].value for name in _DIALECT if values[name].value is not None}
    return requests.Options(given, dialect, run_data.read_reading(values.workdir))


def add_labels(
    predictor: Predictor, query_images: QueryImages, path: str, labels: Sequence[Query]
) -> None:
    """Adds the labels of a table to the run; see `serving.cold_start`."""
    for label in labels:
        if predictor.row_of(label.id) is not None:
            raise InputError(
                f"{path}, line {label.line}: label {label.id!r} exists already; remove it first by "
                "--remove_labels, or choose another id"
            )
    images, notes = query_images.embed(labels)
    for label, vectors, note in zip(labels, images, notes, strict=True):
        if vectors is None and not label.text.strip():
            reason = note or "neither text nor image; expected one of them"
            raise InputError(f"{path}, line {label.line}: {reason}")
        if note:
            print(f"{path}, line {label.line}: {note}")
    texts = [label.text for label in labels]
    ids, examples = [label.id for label in labels], [label.listed for label in labels]
    with errors.writing(f"--workdir={predictor.workdir}"):
        step = cold_start.add_labels(predictor, ids, texts, images, examples)
    predictor.refresh()
    with_examples = sum(any(query.strip() for query in listed) for listed in examples)
    print(
        f"{_labels(len(labels))} added, {with_examples} with example queries; the run "
        f"has {_labels(predictor.num_labels)} now: {step}; --undo takes this back"
    )


def remove_labels(predictor: Predictor, path: str) -> None:
    """Removes labels from the run; a file holds their ids, one per line."""
    names: dict[str, None] = {}
    regular_files.check(path)
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                name = line.rstrip("\r\n")
                is_label = predictor.row_of(name) is not None
                if name and not is_label:
                    raise InputError(f"{path}, line {number}: the run has no label {name[:60]!r}")
                if is_label:
                    names[name] = None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--remove_labels={path}: {error}") from None
    if not names:
        raise InputError(f"--remove_labels={path}: empty; expected ids of labels, one per line")
    if len(names) == predictor.num_labels:
        raise InputError(f"--remove_labels={path}: lists all labels; expected to keep at least one")
    with errors.writing(f"--workdir={predictor.workdir}"):
        step = label_updates.remove(predictor.workdir, predictor.artifacts, [*names])
    predictor.refresh()
    print(
        f"{_labels(len(names))} removed; the run has {_labels(predictor.num_labels)} now: {step}; "
        "--undo takes this back"
    )


def list_changes(workdir: str) -> None:
    """Prints all label updates of a run."""
    paths = label_updates.steps(workdir)
    for path in paths:
        about = label_updates.describe(path)
        names = ", ".join(about.ids[:3]) + (", ..." if len(about.ids) > 3 else "")
        print(f"{path}: {_describe(about)}: {names}")
    print(f"{workdir}: {len(paths)} label update{'' if len(paths) == 1 else 's'}")


def _labels(count: int) -> str:
    return "1 label" if count == 1 else f"{count:,} labels"


def _describe(update: label_updates.Step) -> str:
    """An update in words, such as "addition of 2 labels"."""
    kind = "addition" if update.kind == label_updates.ADD else "removal"
    return f"{kind} of {_labels(len(update.ids))}"


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    _check_flags(values)
    if values.list_changes:
        list_changes(values.workdir)
        return
    if values.undo:
        with errors.writing(f"--workdir={values.workdir}"):
            about = label_updates.undo(values.workdir)
        print(f"undone: {_describe(about)}")
        return
    host_memory.bound_freed_pages()
    compilation_cache.enable(values.compile_cache)
    options = _options(values)
    # Files are opened before the model, so that a wrong one costs no time.
    rows = requests.read_queries(values.queries, options) if values.queries else iter(())
    labels = requests.read_labels(values.add_labels, options) if values.add_labels else []
    predictor = predictor_flags.load(values, warm=False)
    query_images = QueryImages(predictor.image_width, _image_finder(predictor, values))
    if values.queries:
        prediction_files.predict_file(predictor, query_images, rows, _request(values))
    elif values.add_labels:
        add_labels(predictor, query_images, values.add_labels, labels)
    else:
        remove_labels(predictor, values.remove_labels)


def _check_flags(values: flags.FlagValues) -> None:
    """Checks that the flags ask for one action, and that files exist."""
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory that train wrote")
    given = [name for name in _ACTIONS if values[name].value]
    if len(given) != 1:
        raise InputError(
            "expected one of --queries=FILE --out=FILE, --add_labels=FILE, --remove_labels=FILE, "
            f"--undo, --list_changes; found {', '.join('--' + name for name in given) or 'none'}"
        )
    if values.queries and not values.out:
        raise InputError("--out: missing; expected a file to write, such as predictions.jsonl")
    for name in ("queries", "add_labels", "remove_labels", "filters"):
        if values[name].value and not os.path.isfile(values[name].value):
            raise InputError(f"--{name}={values[name].value}: no such file")
    resumable.check_index(values.process_index, values.num_processes)
    if values.queries:
        _check_out(values.out)
    both_exist = values.queries and os.path.exists(values.out)
    if both_exist and os.path.samefile(values.queries, values.out):
        raise InputError(
            f"--out={values.out}: the same file as --queries, which would be overwritten"
        )


def _check_out(path: str) -> None:
    """Checks that a file can be written, before a model is opened for what it is to hold."""
    if os.path.isdir(path):
        raise InputError(f"--out={path}: Is a directory; expected a file to write")
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(parent):  # Missing directories are made later.
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise InputError(f"--out={path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out={path}: {parent} cannot be written to; choose another path")


def _request(values: flags.FlagValues) -> prediction_files.Request:
    """What the flags ask to predict."""
    names = ("search", "image_dtype", *_READING)
    return prediction_files.Request(
        values.queries,
        values.k,
        -np.inf if values.min_score is None else values.min_score,
        values.filters,
        Place(values.out, values.process_index, values.num_processes),
        values.resume or values.num_processes > 1,
        [
            *(values[name].value for name in names),
            dataclasses.asdict(predictor_flags.search_config(values)),
        ],
    )


def _image_finder(predictor: Predictor, values: flags.FlagValues) -> ImageFinder | None:
    """Embeds image files as `prepare` did; None: the run's data came with embeddings or none."""
    model, keep_aspect = encoder.model_of(predictor.artifacts.about.images)
    if not model:
        return None
    directory = workdir_lib.path_of(values.workdir, "images", "pictures")
    if values.num_processes > 1:  # Each adds embeddings to a store of its own.
        directory = Place(directory, values.process_index, values.num_processes).part
    return ImageFinder(
        model,
        directory,
        keep_aspect=keep_aspect,
        batch=16,
        dtype=values.image_dtype,
        bounds=download.DownloadSettings(allow_private=values.allow_private_hosts),
    )


def define_flags() -> None:
    """Defines the flags of the command; everything else comes from the run directory."""
    text = flags.DEFINE_string
    text("workdir", "", "Run directory that train wrote.")
    text("queries", "", "Queries: csv, tsv, jsonl (.gz, .zst) or parquet.")
    text("out", "", "Predictions to write: a line of JSON per query, in order.")
    flags.DEFINE_integer("k", 10, "Maximum number of labels per query.", lower_bound=1)
    flags.DEFINE_float(
        "min_score",
        None,
        "Labels with a lower score are left out. In a run with a label head, a score is the "
        "probability that a label drawn from those of the query is this one. Otherwise it is a "
        "cosine, or with training neighbours a share among the labels found.",
    )
    flags.DEFINE_boolean(
        "resume",
        False,
        "Keep what a stopped process has predicted, and go on with it when the same command is run "
        "again. So it is with several processes.",
    )
    flags.DEFINE_integer(
        "num_processes",
        1,
        "Processes that share the queries. Each writes a file of its own: "
        "predictions-00002-of-00004.jsonl for process 2 of 4.",
        lower_bound=1,
        upper_bound=100_000,
    )
    flags.DEFINE_integer(
        "process_index", 0, "Index of this process, from 0.", lower_bound=0, upper_bound=99_999
    )
    text(
        "filters",
        "",
        "Labels never predicted: lines of query id and label id. A column 'filter' of the queries "
        "has the same effect.",
    )
    text(
        "add_labels",
        "",
        "Table of labels to add to the run. It has columns for id, text and images like the "
        "queries, and optionally 'examples', a list of queries for which the label is relevant.",
    )
    text("remove_labels", "", "File of ids of labels to remove, one per line.")
    flags.DEFINE_boolean("undo", False, "Take back the last addition or removal of labels.")
    flags.DEFINE_boolean("list_changes", False, "List additions and removals of labels.")
    as_prepared = "Default: as in the data of the run, else inferred."
    text("id_column", "", f"Column of the id, else the line number. {as_prepared}")
    text(
        "text",
        "",
        f"Column of the text, or a template. Example: '{{title}} by {{brand}}'. {as_prepared}",
    )
    text("image_column", "", f"Column of image paths or URLs, separated by '|'. {as_prepared}")
    text("embedding_column", "", f"Column of image embeddings. {as_prepared}")
    text(
        "encoding",
        None,
        "Encoding of csv, tsv and jsonl files, such as cp1252. Default: as in the data of the run, "
        "else utf-8.",
    )
    text(
        "delimiter",
        None,
        "Character between the fields of csv and tsv; \\t is a tab. Default: as in the data of the "
        "run, else found in the header.",
    )
    text(
        "quotechar",
        None,
        "Character around the fields of csv and tsv; 'none': there is none. Default: as in the "
        "data of the run, else '\"' in csv and none in tsv.",
    )
    flags.DEFINE_boolean(
        "allow_private_hosts", False, "Also download images from private addresses."
    )
    predictor_flags.define()


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
