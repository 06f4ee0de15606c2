"""Broken input through the door: one clear line, exit status 2, nothing half-written left."""

import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

from tests.data.sources import random_tables
from vixml_jax import prepare
from vixml_jax.data import store
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]


def run(source, out, **options):
    """The door without its process: None, or the line on which it ends."""
    values = flags.FlagValues()
    prepare.define_flags(values)
    settings = {"source": source, "out": out, "vocab_size": 64, "max_tokens": 8} | options
    values(["prepare", *(f"--{name}={value}" for name, value in settings.items())])
    try:
        prepare.run(values)
    except InputError as error:
        return " ".join(str(error).split())
    return None


def mangle(data, draw):
    """Bytes of a file, broken somewhere."""
    at = draw(st.integers(0, len(data)))
    length = draw(st.integers(0, 40))
    junk = draw(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [b'"', b"\n", b",", b"\xff\xfe", b"\x00", b"NaN", b"[", b"}", b"\r", b"\xed\xa0"]
            ),
        )
    )  # fmt: skip
    how = draw(st.sampled_from(["replace", "cut", "repeat", "insert"]))
    if how == "cut":
        return data[:at]
    if how == "repeat":
        return data[:at] + data[max(0, at - length) : at] + data[at:]
    return data[:at] + junk + data[at + (length if how == "replace" else 0) :]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.zst", "xml"])
def test_mangled_files_end_in_a_line_or_in_a_whole_data_set(tmp_path_factory, kind):
    root = tmp_path_factory.mktemp("fuzz")
    held = random_tables.draw(7, train=12, test=6, labels=5)
    if kind == "xml":
        random_tables.write_xml(held, root / "whole")
    else:
        random_tables.write_tables(held, root / "whole", kind)
    names = sorted(path.name for path in (root / "whole").iterdir() if path.stat().st_size)
    ended = {"whole": 0, "refused": 0}

    @hypothesis.settings(max_examples=60, deadline=None, database=None)
    @hypothesis.given(st.data())
    def check(data):
        shutil.rmtree(root / "source", ignore_errors=True)
        shutil.rmtree(root / "place", ignore_errors=True)
        shutil.copytree(root / "whole", root / "source")
        (root / "place").mkdir()
        path = root / "source" / data.draw(st.sampled_from(names))
        path.write_bytes(mangle(path.read_bytes(), data.draw))
        fault = run(root / "source", root / "place" / "out")
        left = sorted(os.listdir(root / "place"))
        if fault is None:
            ended["whole"] += 1
            assert left == ["out"]
            dataset = store.PreparedDataset.open(str(root / "place" / "out"))
            assert all("\ufffd" not in text for text in dataset.labels.texts)
        else:
            ended["refused"] += 1
            assert left == []
            assert len(fault) < 600 and (str(root) in fault or fault.startswith("--")), fault

    check()
    assert ended["refused"] > 0


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
def test_rows_of_anything_are_refused_or_read(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("rows")
    (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fault = run(root / "q.jsonl", root / "out", test=0.5)
    assert sorted(os.listdir(root)) == (["out", "q.jsonl"] if fault is None else ["q.jsonl"])


def door(*words, limit=None):
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "vixml_jax.prepare", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=lower if limit else None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "xml"])
def test_a_file_that_grows_too_large_leaves_nothing(tmp_path, kind):
    held = random_tables.draw(2, train=3000)
    source = tmp_path / "source"
    if kind == "xml":
        random_tables.write_xml(held, source)
    else:
        random_tables.write_tables(held, source, kind)
    (tmp_path / "place").mkdir()
    words = [f"--source={source}", f"--out={tmp_path / 'place' / 'out'}", "--vocab_size=64"]
    done = door(*words, limit=20_000)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "File too large while writing; nothing of it was kept" in done.stderr
    assert os.listdir(tmp_path / "place") == []
    assert door(*words).returncode == 0


@pytest.mark.parametrize("writes", [1, 5, 20, 40])
def test_a_full_disk_leaves_nothing_new_and_keeps_what_was_there(tmp_path, monkeypatch, writes):
    held = random_tables.draw(2)
    random_tables.write_tables(held, tmp_path / "source", "csv")
    place = tmp_path / "place"
    place.mkdir()
    assert run(tmp_path / "source", place / "out") is None
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    append, count = store.ArrayFile.append, 0

    def fail(self, rows):
        nonlocal count
        count += 1
        if count == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, rows)

    monkeypatch.setattr(store.ArrayFile, "append", fail)
    fault = run(tmp_path / "source", place / "out", overwrite=True, max_tokens=7)
    assert fault == (
        f"--out={place / 'out'}: No space left on device while writing; nothing of it was kept: "
        "make room, or choose another place"
    )
    assert os.listdir(place) == ["out"]
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == before


def test_the_door_says_what_is_wrong_on_one_line(tmp_path):
    out = f"--out={tmp_path / 'not' / 'there' / 'out'}"
    for name, data, fault in (
        ("a.csv", b"id,text,labels\n1,a\n", "a.csv, line 2: 2 fields, expected 3"),
        ("b.csv", b"", "b.csv: empty, zero bytes"),
        ("c.jsonl", b'{"text": "a", "labels": ["x"], "embedding": [NaN]}\n', "NaN is no number"),
    ):
        (tmp_path / name).write_bytes(data)
        done = door(f"--source={tmp_path / name}", out)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert fault in done.stderr and done.stderr.startswith("error: ")
    (tmp_path / "fine.csv").write_text("text,labels\na,x\nb,y\nc,x\n")
    done = door(f"--source={tmp_path / 'fine.csv'}", "--dry_run")
    assert done.returncode == 0 and "dry run: nothing was written" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.csv", "c.jsonl", "fine.csv"]
