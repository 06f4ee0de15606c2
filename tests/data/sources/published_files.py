"""Small synthetic files in the formats in which public data sets are published."""

import dataclasses
import gzip
import json

import numpy as np
from scipy import sparse

from vixml_jax.data.sources import catalog, tfds_records

WORDS = np.array("red green blue Straße naïve 漢字 шина 🚲 car\ttab house".split(" "))
SIZES = {"train": 23, "labels": 9, "test": 7}
PREFIX = {"train": "trn", "labels": "lbl", "test": "tst"}


def random_rows(seed=0):
    """The contents of a synthetic data set: a list of published rows for each part."""
    rng = np.random.default_rng(seed)

    def text(min_words):
        return " ".join(rng.choice(WORDS, rng.integers(min_words, 6)))

    held = {}
    for part, count in SIZES.items():
        held[part] = [
            {"uid": f"B{part[:2]}{row:04}ß", "title": text(1), "content": text(0)}
            for row in range(count)
        ]
        for row in held[part] if part != "labels" else ():
            labels = rng.permutation(SIZES["labels"])[: rng.integers(0, 5)].tolist()
            row |= {"target_ind": labels, "target_rel": [1.0] * len(labels)}
    held["train"][0] |= {"target_ind": [3, 1], "target_rel": [1.0, 1.0]}  # Not sorted.
    return held


def write_json(directory, held):
    directory.mkdir(parents=True, exist_ok=True)
    for part, rows in held.items():
        lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
        with gzip.open(directory / f"{PREFIX[part]}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    return held


def write_lines(directory, held, layout, encoding="utf-8"):
    """Writes the titles in a layout with one text per line, and the relevance in files."""
    for part, rows in held.items():
        path = directory / layout.texts[part][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        for row in rows:
            row["content"] = ""
            row["title"] = row["title"].encode(encoding, "ignore").decode(encoding)
            row["uid"] = row["uid"].encode("ascii", "ignore").decode() if layout.with_ids else ""
        lines = [f"{row['uid']}->" * layout.with_ids + row["title"] for row in rows]
        path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
        if part == "labels":
            continue
        path = directory / layout.relevance[part][0]
        if path.suffix == ".npz":
            sparse.save_npz(path, sparse.csr_matrix(relevance_of(rows)))
        else:
            lines = [" ".join(f"{label}:1.0" for label in row["target_ind"]) for row in rows]
            path.write_text(f"{len(rows)} {SIZES['labels']}\n" + "".join(f"{x}\n" for x in lines))
    return held


def relevance_of(rows):
    matrix = np.zeros((len(rows), SIZES["labels"]), np.float32)
    for matrix_row, row in zip(matrix, rows, strict=True):
        matrix_row[row["target_ind"]] = 1.0
    return matrix


def write_filters(directory, seed=1):
    rng = np.random.default_rng(seed)
    pairs = {}
    for split in ("train", "test"):
        flat = np.sort(rng.permutation(SIZES[split] * SIZES["labels"])[:6])
        pairs[split] = np.stack([flat // SIZES["labels"], flat % SIZES["labels"]], axis=1)
        text = "".join(f"{query} {label}\n" for query, label in rng.permutation(pairs[split]))
        (directory / f"filter_labels_{split}.txt").write_text(text)
    return pairs


def titles(rows):
    return [row["title"].strip() for row in rows]


def titles_and_contents(rows):
    return [f"{row['title']} {row['content']}".strip() for row in rows]


def shrink_catalogue(monkeypatch):
    """Gives every data set of the catalogue the synthetic sizes, and shards of a few rows."""
    for key, dataset in catalog.CATALOG.items():
        monkeypatch.setitem(catalog.CATALOG, key, dataclasses.replace(dataset, **SIZES))
    monkeypatch.setattr(tfds_records, "_SHARD", 5)
    monkeypatch.setattr(tfds_records, "_CHUNK", 3)
