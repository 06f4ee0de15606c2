"""Prepares a data set for training: reads a source, tokenizes its texts and embeds its images.

The prepared data set is a directory of memory-mapped arrays; see `vixml_jax.data.store`.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from vixml_jax import command_line, errors
from vixml_jax.data import prepare_line, preprocessing, summary
from vixml_jax.data.images import download, image_reader, named_images
from vixml_jax.data.problems import Problems
from vixml_jax.data.sources import catalog, columns
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.data.sources.raw import RawDataset
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.storage import atomic, locks, object_store, resumable, text_files
from vixml_jax.storage.resumable import Place

if TYPE_CHECKING:
    from vixml_jax.image_encoding.finder import ImageFinder

COMMON_FLAGS = (
    "source",
    "out",
    "dry_run",
    "catalog",
    "text",
    "labels_column",
    "tokenizer",
    "max_tokens",
    "images",
    "valid",
    "test",
    "split_by",
    "overwrite",
)
# Flags whose names differ from those of their settings.
_FLAG_OF = {
    (columns.Columns, name): f"{name}_column"
    for name in ("id", "labels", "weights", "image", "embedding", "split", "label_id")
}


def main(argv: Sequence[str]) -> None:
    """Runs the command; see `run`."""
    del argv
    run(flags.FLAGS)


def run(values: flags.FlagValues) -> None:
    """Prepares a data set as set by the flags.

    Raises:
      InputError: If a flag or the source is invalid.
    """
    if values.catalog:
        print(catalog.table())
        return
    if not values.source:
        raise InputError(
            "--source: missing; expected a file, a directory or a name that --catalog lists"
        )
    if not values.out and not values.dry_run:
        raise InputError("--out: missing; expected a directory to write")
    resumable.check_index(values.process_index, values.num_processes)
    if values.num_processes > 1 and not values.images:
        raise InputError(
            f"--num_processes={values.num_processes}: expected --images=MODEL with it, since "
            "processes share the images; texts are tokenized by one process on all its cores"
        )
    for name in ("source", "labels_source", "out"):
        text_files.check_path(os.path.abspath(values[name].value), name)
    if values.source == preprocessing.GLYPHS:
        preprocessing.note_glyphs("source")
    settings = _settings(values)
    if not object_store.is_local(values.out):
        raise InputError(
            f"--out={values.out}: expected a local directory; copy it afterwards with "
            "gcloud storage cp -r"
        )
    if values.dry_run:
        _dry_run(values, settings)
        return
    preprocessing.check(values.out, settings, overwrite=values.overwrite)
    finder = _image_finder(values)
    with errors.writing(f"--out={values.out}"), _spool(values) as spool:
        raw = _read(values, spool)
        settings = _settings(values, preprocessing.sizes_of(raw))
        aspect = "aspect kept" if values.keep_aspect else "stretched"
        embedding = {}
        if finder is not None:
            embedding["image_source"] = f"{values.images}, {aspect}"
            embedding["embed_images"] = functools.partial(
                finder.embed_dataset, finishing=functools.partial(_finishing, values)
            )
        dataset = preprocessing.prepare(
            raw,
            values.out,
            settings,
            arguments=prepare_line.arguments(values),
            overwrite=values.overwrite,
            **embedding,
        )
    if dataset is None:
        print(
            f"process {values.process_index} of {values.num_processes} has embedded its part of "
            f"the images; {finder.unfinished}"
        )
        return
    print(summary.describe(dataset))
    if finder is not None and finder.used:
        print(finder.describe())


def _dry_run(values: flags.FlagValues, settings: preprocessing.Settings) -> None:
    """Prints how the source is read, or all its problems at once.

    Raises:
      InputError: If there is a problem.
    """
    problems = Problems(collect=True)
    with problems.noting():
        preprocessing.check(values.out, settings, overwrite=True)
    with problems.noting():
        _image_finder(values)
    with tempfile.TemporaryDirectory() as spool, problems.noting():
        raw = _read(values, spool, problems)
        settings = _settings(values, preprocessing.sizes_of(raw))
        raw, notes = preprocessing.split_and_filter(raw, settings)
        raw = named_images.check_files(raw) if values.images else named_images.drop(raw)
        problems.stop()
        print(summary.preview(raw, notes))
    problems.report()
    console.status("dry run: nothing was written")


def _read(values: flags.FlagValues, spool: str, problems: Problems | None = None) -> RawDataset:
    """The source, whose temporary files are in `spool`; `problems` are those of a dry run."""
    raw = preprocessing.read_source(
        values.source,
        spool,
        dialect=_dialect(values),
        seed=values.seed,
        find_images=named_images.find if values.images else named_images.find_embeddings_or_names,
        names=columns.Columns(**_values_of(columns.Columns, values)),
        labels_source=values.labels_source,
        split_by=values.split_by,
        with_images=bool(values.images),
        problems=problems,
        data_dir=values.data_dir,
        manual_dir=values.manual_dir,
    )
    if values.images and not named_images.parts(raw):
        raise InputError(
            f"--images={values.images}: {values.source} names no image files; expected an "
            "image column or {trn,val,tst,lbl}_images.txt"
        )
    return raw


def _values_of(group: Any, values: flags.FlagValues) -> dict[str, Any]:
    """The values of the flags for the fields of a dataclass."""
    return {
        field.name: values[_FLAG_OF.get((group, field.name), field.name)].value
        for field in dataclasses.fields(group)
    }


def _dialect(values: flags.FlagValues) -> Dialect:
    return Dialect(encoding=values.encoding, delimiter=values.delimiter, quotechar=values.quotechar)


def _settings(
    values: flags.FlagValues, sizes: Mapping[str, int] | None = None
) -> preprocessing.Settings:
    """Settings; A and B are those of the public data set, or the usual ones, if not given.

    Args:
      values: The flags.
      sizes: Sizes of the source, once it has been read; A and B are then printed.
    """
    given = _values_of(preprocessing.Settings, values)
    found = catalog.propensity(values.source, sizes)
    explicit = {name for name in ("propensity_a", "propensity_b") if given[name] is not None}
    default = {"propensity_a": found.a, "propensity_b": found.b}
    given |= {name: value for name, value in default.items() if name not in explicit}
    if sizes is not None:
        origins = [f"--{name}" for name in sorted(explicit)]
        origins += [found.origin] if len(explicit) < 2 else []
        a, b = given["propensity_a"], given["propensity_b"]
        console.status(f"inverse propensity: A {a:g}, B {b:g} ({'; '.join(origins)})")
    return preprocessing.Settings(**given)


def _image_finder(values: flags.FlagValues) -> "ImageFinder | None":
    """Embeds image files, if --images is given."""
    if not values.images:
        return None
    if values.source == preprocessing.GLYPHS:
        raise InputError(
            f"--images={values.images}: 'glyphs' comes with image embeddings; leave out --images"
        )
    from vixml_jax.image_encoding import encoder, finder

    encoder.check_model(values.images)
    return finder.ImageFinder(
        values.images,
        os.path.normpath(values.out) + ".images",
        keep_aspect=values.keep_aspect,
        batch=values.image_batch,
        dtype=values.image_dtype,
        bounds=download.DownloadSettings(
            connections=values.connections,
            max_bytes=values.max_image_mib << 20,
            allow_private=values.allow_private_hosts,
        ),
        place=_place(values),
    )


def _place(values: flags.FlagValues) -> Place:
    """Which of how many processes this is."""
    return Place(os.path.abspath(values.out), values.process_index, values.num_processes)


@contextlib.contextmanager
def _spool(values: flags.FlagValues) -> Iterator[str]:
    """A temporary directory for the contents of tables, on the disk of --out, which is locked.

    One of several processes locks its part of --out alone.
    """
    parent, name = os.path.split(_place(values).part)
    if values.num_processes > 1:  # All must find the same directory for their locks.
        os.makedirs(parent, exist_ok=True)
    while not os.path.isdir(parent):  # Parents of --out are created only after all is read.
        parent = os.path.dirname(parent)
    with _locked(values, parent, name), atomic.scratch(os.path.join(parent, name)) as spool:
        yield spool


def _finishing(values: flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """The lock of --out, which a single process holds already."""
    if values.num_processes == 1:
        return contextlib.nullcontext()
    return _locked(values, *os.path.split(os.path.abspath(values.out)))


def _locked(
    values: flags.FlagValues, parent: str, name: str
) -> contextlib.AbstractContextManager[None]:
    return locks.exclusive(parent, doing=f"preparing --out={values.out}", name=f".{name}.lock")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command."""
    text, switch, integer, number, choice = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_boolean,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_enum,
        )
    )
    text(
        "source",
        "",
        "Data to prepare: a table, a directory or a public data set. A table is a csv, tsv, jsonl, "
        "json, parquet or arrow file of queries (text also as .gz or .zst); a directory has such "
        "files or shards named train, valid, test and labels, or the XML repository's layout, or "
        "was written by save_to_disk of datasets; a public data set is a name that --catalog "
        "lists, hf:NAME of the Hugging Face hub, or 'glyphs', the built-in data.",
    )
    text("out", "", "Directory to write. It appears only when it is complete.")
    switch(
        "dry_run",
        False,
        "Print how the source is read, and write nothing. Shows the columns, counts, first rows "
        "and warnings.",
    )
    switch("catalog", False, "Print the data sets that --source knows by name, and stop.")
    for name, about in (
        ("id_column", "Column of the query ids."),
        ("text", "Column of the query text, or a template: {title} by {brand}."),
        ("labels_column", "Column of the labels: a list, a JSON list or a string."),
        ("label_separator", "Separator of the labels in a string; \\t is a tab."),
        ("weights_column", "Column of the weights of the labels as sampled positives."),
        ("image_column", "Column of image paths or URLs ('|' separates several), for --images."),
        ("embedding_column", "Column of an image embedding, or of a list of several."),
        ("split_column", "Column with train, valid or test."),
        ("label_id_column", "Column of the ids in the table of labels."),
        ("label_text", "Column of the text in the table of labels, or a template."),
    ):
        text(name, "", f"{about} Empty: inferred; 'none': there is none.")
    choice(
        "labels_are",
        "auto",
        ["auto", "ids", "texts", "rows"],
        "How queries refer to the table of labels. By their ids, texts or rows (numbers from 0); "
        "'auto' infers it.",
    )
    text("labels_source", "", "Table of the labels, if it is not in --source.")
    text(
        "tokenizer",
        "train",
        "Directory or Hugging Face name of a fast tokenizer. 'train' trains a new one on the "
        "training queries and the labels, for a text tower that is trained from scratch.",
    )
    integer("max_tokens", 32, "Maximum number of tokens of a text, with special tokens.")
    integer("vocab_size", 8192, "Maximum vocabulary size of a tokenizer that is trained.")
    text(
        "encoding",
        "utf-8",
        "Text encoding of the source, such as cp1252 (Excel, Windows) or latin-1. Files that begin "
        "with a byte order mark, in UTF-8 or UTF-16, are recognised.",
    )
    text(
        "delimiter",
        "",
        "Character between the fields of csv and tsv; \\t is a tab. Empty: a comma in csv and a "
        "tab in tsv, or what the header has instead: ; , | or a tab.",
    )
    text(
        "quotechar",
        "",
        "Character around the fields of csv and tsv; 'none': quotes are characters like others. "
        "Empty: '\"' in csv, none in tsv.",
    )
    text(
        "images",
        "",
        "SigLIP model (directory or name) that embeds image files. The files are named in the "
        "image column, or in {trn,val,tst,lbl}_images.txt (a line per item, tabs between paths).",
    )
    switch("keep_aspect", False, "Shrink images to fit and pad with white instead of stretching.")
    integer(
        "image_batch",
        64,
        "Number of images embedded together. It is rounded up to a multiple of the number of "
        "devices, which share each batch.",
        lower_bound=1,
        upper_bound=1 << 12,
    )
    choice("image_dtype", "float32", ["float32", "bfloat16"], "Compute dtype of the vision model.")
    integer(
        "connections",
        16,
        "Simultaneous downloads of image URLs.",
        lower_bound=1,
        upper_bound=1024,
    )
    integer(
        "max_image_mib",
        20,
        "Maximum size of a downloaded image in MiB.",
        lower_bound=1,
        upper_bound=image_reader.MAX_BYTES >> 20,
    )
    switch(
        "allow_private_hosts",
        False,
        "Also download from private and loopback addresses. Not safe for data from others, whose "
        "URLs could then reach internal servers.",
    )
    number(
        "valid",
        0.0,
        "Fraction of the training queries held out for validation. For example 0.02; 0: no "
        "validation split.",
    )
    number("test", 0.2, "Fraction of the queries for a test split, if there is none.")
    text(
        "split_by",
        "random",
        "How held-out queries are chosen. 'random'; 'text': equal texts stay together; "
        "'group:COLUMN': equal values stay together; 'time:COLUMN': the newest are held out.",
    )
    choice(
        "filters",
        "auto",
        list(preprocessing.FILTERS),
        "Pairs of query and label that are never predicted. 'auto': those of the source, or, if it "
        "gives none, labels that are the query itself; 'none': only those of the source.",
    )
    number(
        "propensity_a",
        None,
        "Constant A of inverse propensities, for sampling and PSP. Default: that of the public "
        "data set, which is recognised by its name or sizes, else 0.6.",
    )
    number(
        "propensity_b",
        None,
        "Constant B of inverse propensities, for sampling and PSP. Default: that of the public "
        "data set, which is recognised by its name or sizes, else 2.6.",
    )
    integer("seed", 0, "Seed of random splits and of the built-in data.")
    integer(
        "num_processes",
        1,
        "Processes that share the images, on one or several hosts. Each is started by the same "
        "command with a --process_index of its own and the same disk; the one that is the last to "
        "end writes the data set.",
        lower_bound=1,
        upper_bound=100_000,
    )
    integer("process_index", 0, "Index of this process, from 0.", lower_bound=0, upper_bound=99_999)
    switch("overwrite", False, "Replace a prepared data set in --out.")
    text(
        "data_dir",
        None,
        "Directory where TFDS stores public data sets. Default: $TFDS_DATA_DIR, else "
        "~/tensorflow_datasets.",
    )
    text(
        "manual_dir",
        None,
        "Directory of files of a public data set downloaded by hand. Default: "
        "downloads/manual/NAME in --data_dir.",
    )


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
