"""The door that prepares data: `python -m vixml_jax.prepare --source=DIR --out=DIR`."""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax.data import preprocessing
from vixml_jax.data.images import download, image_files
from vixml_jax.data.sources import catalog, columns
from vixml_jax.errors import InputError
from vixml_jax.storage import object_store

# Flags that are not called as their setting.
_FLAG_OF = {
    (columns.Columns, name): f"{name}_column"
    for name in ("id", "labels", "weights", "image", "embedding", "split", "label_id")
}


def main(argv: Sequence[str]) -> None:
    del argv
    run(flags.FLAGS)


def run(values: flags.FlagValues) -> None:
    """Prepares what the flags say.

    Raises:
      InputError: If a flag or the source is at fault.
    """
    if values.catalog:
        print(catalog.table())
        return
    for name in ("source",) if values.dry_run else ("source", "out"):
        if not values[name].value:
            raise InputError(f"--{name}: missing")
    settings = preprocessing.Settings(
        **_with_propensity(_told(preprocessing.Settings, values), values)
    )
    if not object_store.is_local(values.out):
        raise InputError(
            f"--out={values.out}: expected a directory of this machine; copy it there afterwards: "
            "gcloud storage cp -r"
        )
    preprocessing.check(values.out, settings, overwrite=values.overwrite or values.dry_run)
    finder = None
    if values.images and not values.dry_run:
        if values.source == preprocessing.GLYPHS:
            raise InputError("--images: 'glyphs' has its pictures already")
        finder = ImageFinder(
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
        )
    with errors.writing(f"--out={values.out}"), _spool(values) as spool:
        raw = preprocessing.read_source(
            values.source,
            spool,
            encoding=values.encoding,
            seed=values.seed,
            find_images=image_files.read_images if finder is None else finder.find,
            names=columns.Columns(**_told(columns.Columns, values)),
            labels_source=values.labels_source,
            split_by=values.split_by,
            embed_paths=None if finder is None else finder.embed,
            data_dir=values.data_dir,
            manual_dir=values.manual_dir,
        )
        if finder is not None and not finder.used:
            raise InputError(
                f"--images={values.images}: {values.source} names no image files, in no column and "
                "not in {trn,tst,lbl}_images.txt"
            )
        if values.dry_run:
            print(preprocessing.preview(*preprocessing.settle(raw, settings)))
            print("dry run: nothing was written")
            return
        aspect = "aspect kept" if values.keep_aspect else "stretched"
        dataset = preprocessing.prepare(
            raw,
            values.out,
            settings,
            pictures="" if finder is None else f"{values.images}, {aspect}",
            overwrite=values.overwrite,
        )
    print(preprocessing.describe(dataset))
    if finder is not None:
        print(finder.describe())


def _told(group: Any, values: flags.FlagValues) -> dict[str, Any]:
    """The fields of a group of settings, as its flags say them."""
    return {
        field.name: values[_FLAG_OF.get((group, field.name), field.name)].value
        for field in dataclasses.fields(group)
    }


def _with_propensity(told: dict[str, Any], values: flags.FlagValues) -> dict[str, Any]:
    """Settings with A and B: as told, else those of the public data set, else the usual."""
    usual = zip(("propensity_a", "propensity_b"), catalog.propensity(values.source), strict=True)
    return told | {name: value for name, value in usual if told[name] is None}


def _spool(values: flags.FlagValues) -> contextlib.AbstractContextManager[str]:
    """A directory, gone at the end, for what tables hold: beside --out, where there is room."""
    if values.dry_run:
        return tempfile.TemporaryDirectory()
    parent, name = os.path.split(os.path.abspath(values.out))
    while not os.path.isdir(parent):  # Made when all is read, not before.
        parent = os.path.dirname(parent)
    return tempfile.TemporaryDirectory(dir=parent, prefix=f"{name}.tmp-")


class ImageFinder:
    """Embeds the image files and urls that a source names, as `--images` says; resumes."""

    def __init__(
        self,
        model: str,
        directory: str,
        *,
        keep_aspect: bool,
        batch: int,
        dtype: str,
        bounds: download.DownloadSettings,
    ):
        self._model, self._directory, self._bounds = model, directory, bounds
        self._keep_aspect, self._batch, self._dtype = keep_aspect, batch, dtype
        self.broken: dict[str, str] = {}  # What is wrong with files and urls.
        self._named = 0

    @functools.cached_property
    def _tower(self) -> tuple[Any, ...]:
        """Vision tower, parameters, image processor and store; loaded where a file is named."""
        from vixml_jax.models import hf_checkpoints
        from vixml_jax.models.siglip import VisionTower

        where = hf_checkpoints.resolve(self._model)
        config, params = hf_checkpoints.load_hf_vision(where, dtype=self._dtype)
        processor = image_files.read_processor(os.path.join(where, "preprocessor_config.json"))
        if (processor.height, processor.width) != (config.image_size,) * 2:
            raise InputError(
                f"--images={self._model}: pictures of {processor.height} x {processor.width} for "
                f"a model of {config.image_size} x {config.image_size}"
            )
        config = dataclasses.replace(config, dtype=self._dtype)
        about = {
            "model": self._model,
            "config": dataclasses.asdict(config),
            "processor": json.loads(json.dumps(processor)),
            "keep_aspect": self._keep_aspect,
        }
        store = image_files.EmbeddingStore(self._directory, width=config.width, about=about)
        return VisionTower(config), params, processor, store

    @property
    def used(self) -> bool:
        """Whether any image file was named."""
        return self._named > 0

    def find(self, directory: str, prefix: str, count: int) -> image_files.FileImages | None:
        """The pictures that one of the files of a directory names, embedded."""
        paths = image_files.read_paths(directory, prefix, count)
        if paths is None:
            return None
        return self.embed(os.path.join(directory, f"{prefix}_images.txt"), paths)

    def embed(self, name: str, paths: list[list[str]]) -> image_files.FileImages:
        """The pictures of items, by paths or urls of their files; `name` is for messages."""
        from vixml_jax import modeling

        count = len(paths)
        tower, params, processor, store = self._tower
        file_of, faults = self._download(name for item in paths for name in item)
        files = [[file_of[name] for name in item if name in file_of] for item in paths]
        row_of, broken = modeling.embed_files(
            tower,
            params,
            [path for item in files for path in item],
            store,
            processor,
            batch=self._batch,
            keep_aspect=self._keep_aspect,
            threads=os.cpu_count() or 1,
        )
        self._named += sum(map(len, paths))
        faults |= {name: broken[path] for name, path in file_of.items() if path in broken}
        self.broken |= faults
        with open(os.path.join(self._directory, "broken.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{name}\t{fault}\n" for name, fault in self.broken.items())
        found = [[row_of[path] for path in item if path in row_of] for item in files]
        rows = np.full((count, max(1, max(map(len, found), default=1))), -1, np.int64)
        for i, item in enumerate(found):
            rows[i, : len(item)] = item
        return image_files.FileImages(rows, store.vectors(), name)

    def _download(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The file of each path (itself) and url (downloaded), and what is wrong with the rest."""
        names = list(dict.fromkeys(names))
        urls = [name for name in names if download.is_url(name)]
        if not urls:
            return {name: name for name in names}, {}
        directory = os.path.join(self._directory, "files")
        fetched, faults = download.download(urls, directory, settings=self._bounds)
        file_of = {name: fetched.get(name, name) for name in names if name not in faults}
        return file_of, faults

    def describe(self) -> str:
        """What was embedded, and what could not be."""
        line = f"pictures: {self._named} named, vectors in {self._directory}"
        if self.broken:
            listed = os.path.join(self._directory, "broken.txt")
            line += f"; {len(self.broken)} missing or broken, listed in {listed}"
        return line


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of this door."""
    text, switch, number, share, choice = (
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
        "A csv, tsv, jsonl or parquet file (.gz, .zst too) of queries; a directory of such files "
        "or shards, named train, valid, test, labels; a directory in the XML repository's layout; "
        "a public data set that --catalog lists; or 'glyphs', the built-in data.",
    )
    switch("catalog", False, "Print the public data sets that --source knows by name, and stop.")
    text(
        "manual_dir",
        None,
        "Where the files of a public data set are that were downloaded by hand; not told: "
        "downloads/manual/NAME in --data_dir.",
    )
    text(
        "data_dir",
        None,
        "Where TFDS keeps public data sets once they are built; not told: "
        "~/tensorflow_datasets, or $TFDS_DATA_DIR.",
    )
    text("labels_source", "", "Table of the labels, if it is elsewhere.")
    switch(
        "dry_run",
        False,
        "Print what was understood (columns, counts, rows, warnings); write nothing.",
    )
    for name, said in (
        ("id_column", "Column of a query's id."),
        ("text", "Column of a query's text, or a template of several: '{title}. {brand}'."),
        ("labels_column", "Column of a query's labels: a list, JSON of one, or a string of them."),
        ("label_separator", "What stands between the labels of a string; \\t is a tab."),
        ("weights_column", "Column of what each label counts when a positive is drawn."),
        ("image_column", "Column of image paths or urls, read with --images; '|' between several."),
        ("embedding_column", "Column of a picture's embedding, or of a list of several."),
        ("split_column", "Column that says train, valid or test."),
        ("label_id_column", "Column of a label's id, in the table of labels."),
        ("label_text", "Column of a label's text there, or a template."),
    ):
        text(name, "", f"{said} Empty: guessed; 'none': there is none.")
    choice(
        "labels_are",
        "auto",
        ["auto", "ids", "texts", "rows"],
        "What names a label of the table: its id, its text, its row (from 0), or what fits.",
    )
    text("out", "", "Directory to be made; it appears whole or not at all.")
    text(
        "tokenizer",
        "train",
        "Directory or Hugging Face name of a fast tokenizer; 'train': one is trained on the "
        "training queries and labels, for a tower from scratch.",
    )
    number("connections", 16, "Downloads of image urls at a time.", lower_bound=1)
    number("max_image_mib", 20, "Largest image file that is downloaded, MiB.", lower_bound=1)
    switch(
        "allow_private_hosts",
        False,
        "Also download from private and loopback addresses: files from elsewhere may abuse it.",
    )
    text(
        "images",
        "",
        "Hugging Face directory or name of a SigLIP vision model: embeds the image files that the "
        "image column names, or {trn,tst,lbl}_images.txt (a line an item, tabs between paths).",
    )
    switch(
        "keep_aspect", False, "Shrink pictures into the frame, on white, rather than stretch them."
    )
    number("image_batch", 64, "Pictures embedded together.", lower_bound=1)
    choice("image_dtype", "float32", ["float32", "bfloat16"], "What the vision model computes in.")
    number("max_tokens", 32, "Tokens of a text at most, special ones included.")
    choice(
        "encoding",
        "utf-8",
        list(preprocessing.ENCODINGS),
        "What the source's texts are encoded in.",
    )
    number("vocab_size", 8192, "Tokens at most of a tokenizer that is trained.")
    share(
        "propensity_a",
        None,
        "A of the inverse propensities, for sampling and PSP; not told: that of the public data "
        "set, else 0.6.",
    )
    share("propensity_b", None, "B of the inverse propensities; not told: likewise, else 2.6.")
    share("valid", 0.0, "Share of the training queries held out to choose by: 0.02, say; 0: none.")
    share(
        "test",
        0.2,
        "Share of the queries held out to judge on, where the source has no test split.",
    )
    text(
        "split_by",
        "random",
        "How they are drawn: 'random'; 'text', equal texts together; 'group:COLUMN', equal values "
        "together; 'time:COLUMN', the newest.",
    )
    choice(
        "filters",
        "auto",
        list(preprocessing.FILTERS),
        "Pairs of a query and the label that is itself, which are never predicted: 'auto', as the "
        "source gives them, made where it gives none; 'none', as the source gives them alone.",
    )
    number("seed", 0, "Of all that is drawn.")
    switch("overwrite", False, "Replace a prepared data set in --out.")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
