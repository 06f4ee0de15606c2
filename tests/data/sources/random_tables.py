"""Writes a small random data set in the XML repository's layout and as tables of every format."""

import csv
import gzip
import io
import json

import numpy as np
import pyarrow
from pyarrow import parquet

from vixml_jax.data.sources.delimited import Dialect

WORDS = np.array('red green "blue" car, house; tree Straße naïve 漢字 x|1 \t'.split(" "))
# Tables are written by the csv module, whose quotes a tsv file has only if a flag says so.
DIALECTS = {"tsv": Dialect(quotechar='"')}
KINDS = ("csv", "csv.gz", "csv.zst", "tsv", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def draw(seed, *, train=40, test=15, labels=9, width=4):
    """A random data set: texts, and the labels and embedding (None: no image) of each query."""
    rng = np.random.default_rng(seed)

    def texts(count):
        return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 8))) for i in range(count)]

    held = {"labels": {"text": [f"label {text}" for text in texts(labels)]}}
    for split, count in (("train", train), ("test", test)):
        held[split] = {
            "text": texts(count),
            "labels": [np.flatnonzero(row).tolist() for row in rng.random((count, labels)) < 0.3],
            "embedding": [
                rng.normal(size=width).astype(np.float16) if rng.random() < 0.7 else None
                for _ in range(count)
            ],
        }
    return held


def write_xml(held, directory):
    """Writes the XML repository's layout, without filter pairs."""
    directory.mkdir(parents=True)
    num_labels = len(held["labels"]["text"])
    for split, prefix in (("train", "trn"), ("test", "tst"), ("labels", "lbl")):
        part = held[split]
        texts = "".join(f"{text}\n" for text in part["text"])
        (directory / f"{prefix}.raw.txt").write_bytes(texts.encode())
        if split == "labels":
            continue
        (directory / f"filter_labels_{split}.txt").touch()
        rows = [" ".join(f"{label}:1" for label in row) for row in part["labels"]]
        (directory / f"{prefix}_X_Y.txt").write_text(
            f"{len(rows)} {num_labels}\n" + "".join(f"{row}\n" for row in rows)
        )
        has = np.array([vector is not None for vector in part["embedding"]])
        width = next(len(vector) for vector in part["embedding"] if vector is not None)
        vectors = [np.zeros(width) if vector is None else vector for vector in part["embedding"]]
        np.save(directory / f"{prefix}_image_embeddings.npy", np.stack(vectors).astype(np.float16))
        np.save(directory / f"{prefix}_has_image.npy", has)


def write_tables(held, directory, kind, *, shards=1):
    """Writes one table per part: `train.csv`, or the shards `train-0.csv` and so on."""
    directory.mkdir(parents=True)
    for name, part in held.items():
        rows = [
            {"id": str(row)} | {key: values[row] for key, values in part.items()}
            for row in range(len(part["text"]))
        ]
        if name != "labels":
            (directory / f"filter_labels_{name}.txt").touch()
        for shard, indices in enumerate(np.array_split(np.arange(len(rows)), shards)):
            suffix = f"-{shard}.{kind}" if shards > 1 else f".{kind}"
            write_rows([rows[i] for i in indices], directory / f"{name}{suffix}")


def write_rows(rows, path):
    """Writes rows, given as dicts, to one file; its extension determines the format."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if "embedding" in columns:
            vectors = [None if x is None else x.astype(np.float32) for x in columns["embedding"]]
            columns["embedding"] = pyarrow.array(vectors, type=pyarrow.list_(pyarrow.float32()))
        parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
        return
    text = io.StringIO()
    if kind == "jsonl":
        for row in rows:
            row = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
            text.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        writer = csv.writer(text, delimiter="," if kind == "csv" else "\t")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([cell(value) for value in row.values()])
    data = text.getvalue().encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pyarrow.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)


def cell(value):
    """A value as a cell of a csv file."""
    if value is None:
        return ""
    if isinstance(value, np.ndarray):
        return json.dumps(value.tolist())
    return "|".join(map(str, value)) if isinstance(value, list) else value
