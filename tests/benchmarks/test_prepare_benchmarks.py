"""The benchmarks of prepare and of tokenizing on little data."""

import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from pyarrow import parquet

from vixml_jax.benchmarks import prepare, prepare_stages, tokenize
from vixml_jax.benchmarks.support import synthetic_data
from vixml_jax.data.sources import xml_repository
from vixml_jax.errors import InputError

LIKE = synthetic_data.Like(300, 20, 90, 4.0, (3, 6), (1, 2), 8, images=2, width=5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(synthetic_data.LIKE, "lf_amazontitles_1.3m", LIKE)
    monkeypatch.setitem(synthetic_data.LIKE, "lf_wikipedia_500k", LIKE)


def test_synthetic_data_have_the_given_sizes(tmp_path):
    synthetic_data.write(str(tmp_path), LIKE, tokenizer="train")
    raw = xml_repository.read_xml_repository(str(tmp_path))
    assert (raw.train.items.count, raw.test.items.count, raw.labels.count) == (300, 20, 90)
    per_query = np.diff(raw.train.relevance.indptr)
    assert per_query.min() >= 1 and 2.5 < per_query.mean() < 5
    texts = [text for chunk in raw.train.items.read_texts() for text in chunk]
    lengths = [len(text.split(" ")) for text in texts]
    assert (min(lengths), max(lengths)) == (3, 6) and len(set(texts)) > 290
    (values,) = raw.labels.images.read(np.arange(90))
    assert values.shape == (180, 5) and np.isfinite(values).all() and np.ptp(values) > 2
    sizes = {name: os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path)}
    item_images = sum(size for name, size in sizes.items() if name.endswith(".npy"))
    assert item_images == LIKE.image_bytes + 3 * 128
    spoken = sum(size for name, size in sizes.items() if name.endswith(".raw.txt"))
    assert 0.5 < spoken / LIKE.text_bytes < 2


def test_frequent_words_are_those_of_the_tokenizer():
    rng = np.random.default_rng(0)
    words = synthetic_data.Words.make(40_000, prepare.find_tokenizer(), rng)
    texts = [text for chunk in words.texts(2000, (10, 20), rng) for text in chunk]
    spoken = " ".join(texts).lower().split(" ")
    assert 0.02 < np.mean([word == "the" for word in spoken]) < 0.1
    assert len({len(text.split(" ")) for text in texts}) == 11


def test_ranks_by_zipf():
    rng = np.random.default_rng(0)
    counts = np.bincount(synthetic_data.zipf(1000, rng.random(10**6)), minlength=1000)
    expected = 1e6 * np.diff(np.log(np.arange(1, 1002))) / np.log(1001)
    np.testing.assert_allclose(counts[:50], expected[:50], rtol=0.1)
    assert len(counts) == 1000


@pytest.mark.parametrize("keep", [False, True])
def test_prints_a_line_per_step_and_cleans_up(tmp_path, capfd, monkeypatch, keep):
    prepare.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(dir=str(tmp_path), batch=32, keep=keep):
        prepare.main([])
    lines = capfd.readouterr().out.splitlines()
    steps = [line.split("  ")[0].strip() for line in lines[2:] if line[:1] != " "]
    assert steps == ["written", "prepared", "read, epoch 0", "read, epoch 1"]
    assert [line.split()[4] for line in lines if line.startswith("read")]
    assert os.listdir(tmp_path) == (["prepared"] if keep else [])


def test_data_that_do_not_fit_on_the_disk_are_refused(tmp_path):
    big = synthetic_data.Like(10**9, 10**9, 10**9, 4.0, (3, 6), (1, 2), 8)
    with pytest.raises(InputError, match=r"GB free, expected"):
        prepare.check_free(str(tmp_path), big)


def test_memory_of_a_process_and_its_child():
    child = "x = bytearray(2 * 10**8); print(flush=True); input()"
    script = (
        "import subprocess, sys; x = bytearray(10**8)\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with prepare.Memory(process.pid, every=0.005) as memory:
            process.stdout.readline()
            before = len(memory.seen)
            while len(memory.seen) < before + 3:
                pass
        print("\n", file=process.stdin, flush=True)
    whole, own = memory.peak()
    assert 2.9e8 < own < whole < 4e8
    assert memory.peak(begin=memory.seen[-1][0] + 1) == (0, 0)


def settings(**changes):
    return {"file": "", "like": "lf_amazontitles_1.3m", "tokenizer": prepare.find_tokenizer(),
            "texts": 50, "max_tokens": 8, "threads": 1, "words": 1000, **changes}  # fmt: skip


def test_programs_give_the_same_tokens():
    rounds = []
    for name in tokenize.PROGRAMS:
        run = tokenize.prepare([name], settings())[name][1]
        rounds.append([run()["digest"] for _ in range(2)])
    assert rounds[0] == rounds[1] == rounds[2] and rounds[0][0] != rounds[0][1]


def test_tokenising_prints_two_tables(capfd, tmp_path):
    tokenize.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(texts=20, rounds=2, threads=1, words=1000):
        tokenize.main([])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == list(tokenize.PROGRAMS)
    assert len(lines) == 10 and lines[4].split()[5:] == ["1.00"] * 4
    path = tmp_path / "texts.txt"
    path.write_text("a b\n" * 30)
    with flagsaver.flagsaver(file=str(path), texts=20, rounds=2, threads=1):
        with pytest.raises(InputError, match="expected 40 texts"):
            tokenize.main([])


def test_tables_of_stages_hold_the_same_rows(tmp_path):
    prepare_stages.write_tables(str(tmp_path), LIKE, 90, prepare.find_tokenizer())
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = [row | {"labels": row["labels"].split("|")} for row in csv.DictReader(file)]
    assert rows == parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(90)]
    assert {len(row["text"].split()) for row in rows} == {3, 4, 5, 6}
    assert 2.5 < np.mean([len(row["labels"]) for row in rows]) < 6


def test_stages_are_printed_for_both_formats(tmp_path, capfd):
    prepare_stages.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(rows=90, dir=str(tmp_path)):
        prepare_stages.main([])
    lines = [line for line in capfd.readouterr().out.splitlines() if "rows as" in line]
    assert [re.search(r"90 rows as (\w+)", line)[1] for line in lines] == ["csv", "parquet"]
    for line in lines:
        stages = re.findall(r"(\w+) \d+\.\d s \(", line)
        assert stages == ["read", "split", "tokenize", "write"]
    assert os.listdir(tmp_path) == []


def test_a_stage_within_another_is_not_counted_twice(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(prepare_stages.time, "process_time", lambda: next(now))
    clock = prepare_stages.Clock()
    assert clock.switch("write") == ""
    assert clock.switch("tokenize") == "write"
    assert clock.switch("write") == "tokenize"
    clock.switch("")
    assert clock.spent == {"": 1.0, "write": 2.0 + 8.0, "tokenize": 4.0}
