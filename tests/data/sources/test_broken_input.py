"""Invalid input to the prepare command: one clear line, exit status 2, no partial output."""

import csv
import errno
import gzip
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import hypothesis
import pyarrow
import pytest
from absl import flags
from hypothesis import strategies as st
from pyarrow import parquet

from tests.data.sources import random_tables
from vixml_jax import prepare
from vixml_jax.data import store
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]


def run(source, out, **options):
    """Runs the command in this process; returns its error message, or None."""
    values = flags.FlagValues()
    prepare.define_flags(values)
    settings = {"source": source, "out": out, "vocab_size": 64, "max_tokens": 8} | options
    values(["prepare", *(f"--{name}={value}" for name, value in settings.items())])
    try:
        prepare.run(values)
    except InputError as error:
        return " ".join(str(error).split())
    return None


def corrupt(data, draw):
    """The bytes of a file with a random fault."""
    start = draw(st.integers(0, len(data)))
    length = draw(st.integers(0, 40))
    junk = draw(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [b'"', b"\n", b",", b"\xff\xfe", b"\x00", b"NaN", b"[", b"}", b"\r", b"\xed\xa0"]
            ),
        )
    )  # fmt: skip
    fault = draw(st.sampled_from(["replace", "cut", "repeat", "insert"]))
    if fault == "cut":
        return data[:start]
    if fault == "repeat":
        return data[:start] + data[max(0, start - length) : start] + data[start:]
    return data[:start] + junk + data[start + (length if fault == "replace" else 0) :]


def num_rows(path, kind):
    """Number of rows of a table, counted by the csv module, by lines, or by pyarrow."""
    if kind == "parquet":
        return parquet.read_metadata(path).num_rows
    data = path.read_bytes()
    if kind.endswith(".gz"):
        data = gzip.decompress(data)
    elif kind.endswith(".zst"):
        data = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    lines = [line + "\n" for line in data.decode("utf-8-sig").split("\n")]
    if kind.startswith("jsonl"):
        return sum(not line.isspace() for line in lines)
    rows = csv.reader(lines, delimiter="\t" if kind == "tsv" else ",")
    return sum(any(row) or len(row) > 1 for row in rows) - 1


def check_rows(source, kind, info):
    """Checks that every row of the source is in the data set, or told as left out."""
    if kind == "xml":
        return
    num_read = sum(num_rows(source / f"{split}.{kind}", kind) for split in ("train", "test"))
    assert info["rows_read"] == num_read
    left_out = info["train_without_labels_dropped"]
    assert info["num_train"] + info["num_test"] + left_out == num_read


def slow(kind):
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind", ["csv", slow("tsv"), "jsonl", "parquet", slow("csv.gz"), slow("jsonl.zst"), "xml"]
)
def test_corrupted_files_are_refused_or_prepared_completely(tmp_path_factory, kind):
    root = tmp_path_factory.mktemp("fuzz")
    held = random_tables.draw(7, train=12, test=6, labels=5)
    if kind == "xml":
        random_tables.write_xml(held, root / "intact")
    else:
        random_tables.write_tables(held, root / "intact", kind)
    names = sorted(path.name for path in (root / "intact").iterdir() if path.stat().st_size)
    outcomes = {"prepared": 0, "refused": 0}

    @hypothesis.settings(max_examples=40, deadline=None, database=None)
    @hypothesis.given(st.data())
    def check(data):
        shutil.rmtree(root / "source", ignore_errors=True)
        shutil.rmtree(root / "parent", ignore_errors=True)
        shutil.copytree(root / "intact", root / "source")
        (root / "parent").mkdir()
        path = root / "source" / data.draw(st.sampled_from(names))
        path.write_bytes(corrupt(path.read_bytes(), data.draw))
        quotes = {"quotechar": '"'} if kind == "tsv" else {}  # As the csv module writes them.
        message = run(root / "source", root / "parent" / "out", **quotes)
        remaining = sorted(os.listdir(root / "parent"))
        if message is None:
            outcomes["prepared"] += 1
            assert remaining == ["out"]
            dataset = store.PreparedDataset.open(str(root / "parent" / "out"))
            assert all("\ufffd" not in text for text in dataset.labels.texts)
            check_rows(root / "source", kind, dataset.info)
        else:
            outcomes["refused"] += 1
            assert remaining == []
            assert len(message) < 600, message
            assert str(root) in message or message.startswith("--"), message

    check()
    assert outcomes["refused"] > 0


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["id", "text", "labels", "embedding", "split", "label_weights"]),
            st.one_of(
                st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
                st.lists(st.text(max_size=4) | st.integers(0, 9) | st.floats(), max_size=3),
            ),
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_arbitrary_rows_are_refused_or_prepared(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("rows")
    (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = run(root / "q.jsonl", root / "out", test=0.5)
    assert sorted(os.listdir(root)) == (["out", "q.jsonl"] if message is None else ["q.jsonl"])


def run_command(*words, max_file_bytes=None):
    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    return subprocess.run(
        [sys.executable, "-m", "vixml_jax.prepare", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=limit_file_size if max_file_bytes else None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "xml"])
def test_file_size_limit_leaves_no_output(tmp_path, kind):
    held = random_tables.draw(2, train=3000)
    source = tmp_path / "source"
    if kind == "xml":
        random_tables.write_xml(held, source)
    else:
        random_tables.write_tables(held, source, kind)
    (tmp_path / "parent").mkdir()
    words = [f"--source={source}", f"--out={tmp_path / 'parent' / 'out'}", "--vocab_size=64"]
    done = run_command(*words, max_file_bytes=20_000)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "File too large while writing; nothing was kept" in done.stderr
    assert os.listdir(tmp_path / "parent") == []
    assert run_command(*words).returncode == 0


@pytest.mark.parametrize("num_writes", [1, 5, 20, 40])
def test_full_disk_keeps_the_existing_data_set(tmp_path, monkeypatch, num_writes):
    held = random_tables.draw(2)
    random_tables.write_tables(held, tmp_path / "source", "csv")
    parent = tmp_path / "parent"
    parent.mkdir()
    assert run(tmp_path / "source", parent / "out") is None
    before = {path.name: path.read_bytes() for path in (parent / "out").iterdir()}
    append, count = store.ArrayFile.append, 0

    def failing_append(self, rows):
        nonlocal count
        count += 1
        if count == num_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, rows)

    monkeypatch.setattr(store.ArrayFile, "append", failing_append)
    message = run(tmp_path / "source", parent / "out", overwrite=True, max_tokens=7)
    assert message == (
        f"--out={parent / 'out'}: No space left on device while writing; nothing was kept: "
        "free disk space, or choose another path"
    )
    assert os.listdir(parent) == ["out"]
    assert {path.name: path.read_bytes() for path in (parent / "out").iterdir()} == before


def test_command_prints_errors_on_one_line(tmp_path):
    out = f"--out={tmp_path / 'new' / 'directory' / 'out'}"
    for name, data, message in (
        ("a.csv", b"id,text,labels\n1,a\n", "a.csv, line 2: 2 fields, expected 3"),
        ("b.csv", b"", "b.csv: the file is empty (0 bytes)"),
        ("c.jsonl", b'{"text": "a", "labels": ["x"], "embedding": [NaN]}\n', "NaN is not allowed"),
    ):
        (tmp_path / name).write_bytes(data)
        done = run_command(f"--source={tmp_path / name}", out)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr and done.stderr.startswith("error: ")
    (tmp_path / "valid.csv").write_text("text,labels\na,x\nb,y\nc,x\n")
    done = run_command(f"--source={tmp_path / 'valid.csv'}", "--dry_run")
    assert done.returncode == 0 and "dry run: nothing was written" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.csv", "c.jsonl", "valid.csv"]
