"""Compares data prepared from the XML repository's layout with the same data from tables.

    python -m tests.data.sources.compare_formats DIR [DIR ...]

Each directory, in the repository's layout, is written as tables of every format, with ids, labels
in lists or strings, and embeddings in a column. All are prepared, and every file must be the same
byte for byte, except `dataset.json` and `dataset.md`, which name the source. The exit status is 1
if any file differs.
"""

import pathlib
import sys
import tempfile
import time

import numpy as np

from tests.data.sources import random_tables
from vixml_jax.data import preprocessing
from vixml_jax.data.sources.delimited import USUAL

NAME_THE_SOURCE = {"dataset.json", "dataset.md"}


def read_xml(directory):
    """Texts, labels and embeddings in the form of `random_tables.draw`."""
    held = {}
    for part, prefix in (("labels", "lbl"), ("train", "trn"), ("test", "tst")):
        texts = (directory / f"{prefix}.raw.txt").read_bytes().decode().split("\n")[:-1]
        held[part] = {"text": texts}
        if part == "labels":
            continue
        lines = (directory / f"{prefix}_X_Y.txt").read_text().split("\n")[1:-1]
        held[part]["labels"] = [
            [int(pair.partition(":")[0]) for pair in line.split()] for line in lines
        ]
        if (directory / f"{prefix}_image_embeddings.npy").exists():
            vectors = np.load(directory / f"{prefix}_image_embeddings.npy")
            has = np.load(directory / f"{prefix}_has_image.npy")
            held[part]["embedding"] = [
                vector if present else None for vector, present in zip(vectors, has, strict=True)
            ]
    return held


def differing(first, second):
    """Names of the files that differ between two prepared data sets, except in their source."""
    first_files, second_files = (
        {path.name: path.read_bytes() for path in directory.iterdir()}
        for directory in (first, second)
    )
    names = (first_files.keys() | second_files.keys()) - NAME_THE_SOURCE
    return sorted(name for name in names if first_files.get(name) != second_files.get(name))


def compare(source, directory, kinds=random_tables.KINDS):
    """Yields each format, its preparation time in seconds, and the files that differ."""
    held = read_xml(source)
    for kind in ("repository", *kinds):
        tables, dialect = source, random_tables.DIALECTS.get(kind, USUAL)
        if kind != "repository":
            tables = directory / kind / source.name
            random_tables.write_tables(held, tables, kind)
        start, out = time.perf_counter(), directory / f"{kind}.prepared"
        with tempfile.TemporaryDirectory(dir=directory) as spool:
            raw = preprocessing.read_source(str(tables), spool, dialect=dialect)
            preprocessing.prepare(raw, str(out), preprocessing.Settings())
        seconds = time.perf_counter() - start
        yield kind, seconds, differing(directory / "repository.prepared", out)


def main(sources):
    same = True
    for source in map(pathlib.Path, sources):
        with tempfile.TemporaryDirectory() as directory:
            for kind, seconds, names in compare(source.resolve(), pathlib.Path(directory)):
                print(f"{source.name:16} {kind:10} {seconds:6.1f} s  differ: {names}", flush=True)
                same &= not names
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
