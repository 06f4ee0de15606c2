"""The comparison with baselines: features, processes, filters and the table on a tiny data set."""

import importlib.util
import itertools
import json
import os
import re
import sys
from collections import Counter

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from scipy import sparse

from tests import tiny
from vixml_jax import evaluator
from vixml_jax.benchmarks.baselines import __main__ as baselines
from vixml_jax.benchmarks.baselines import features, learners
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.evaluation import knn_baseline
from vixml_jax.storage import json_files

PECOS_PYTHON = os.environ.get("VIXML_JAX_PECOS_PYTHON", "")
NEEDS = {
    "xr_linear": (PECOS_PYTHON, "set VIXML_JAX_PECOS_PYTHON to an interpreter with libpecos"),
    "parabel": (importlib.util.find_spec("omikuji"), "omikuji is not installed"),
    "bonsai": (importlib.util.find_spec("omikuji"), "omikuji is not installed"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny data set whose queries may not get their first label, for some of them."""
    root = tmp_path_factory.mktemp("data")
    (root / "filter_labels_test.txt").write_text(
        "".join(f"{q} {q % 20}\n" for q in range(0, 30, 3))
    )
    return PreparedDataset.open(tiny.make_data(root, train=200))


@pytest.fixture(autouse=True)
def defined_flags():
    baselines.define_flags()
    flags.FLAGS.mark_as_parsed()


def written(tmp_path, dataset, fetched=20):
    baselines.write_inputs(str(tmp_path), dataset, "test", fetched)
    return str(tmp_path)


def oracle(training, queries):
    """TF-IDF by definition: dicts from word or pair of words to weight."""

    def count(text):
        words = [word for word in re.findall(r"\w+", text.lower()) if len(word) > 1]
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
        return Counter(words + pairs)

    having = Counter(term for text in training for term in count(text))

    def weigh(text):
        idf = {term: np.log((1 + len(training)) / (1 + n)) + 1 for term, n in having.items()}
        row = {term: n * idf[term] for term, n in count(text).items() if term in idf}
        length = np.sqrt(sum(value**2 for value in row.values()))
        return {term: value / length for term, value in row.items()}

    return [weigh(text) for text in training], [weigh(text) for text in queries]


def test_features_are_tfidf_of_words_and_pairs_of_words(data, monkeypatch):
    rng = np.random.default_rng()
    words = np.array("red green Blue x grün 緑 re-do 12 12".split())
    texts = {
        split: [" ".join(rng.choice(words, rng.integers(0, 7))) for _ in range(40)]
        for split in ("train", "test")
    }
    texts["test"] += ["never seen", ""]
    monkeypatch.setattr(features, "_texts", lambda _, split: texts[split])
    found = features.tfidf(data, "test")
    for matrix, rows in zip(found, oracle(texts["train"], texts["test"]), strict=True):
        assert matrix.dtype == np.float32 and matrix.shape[0] == len(rows)
        for i, row in enumerate(rows):
            np.testing.assert_allclose(
                np.sort(matrix[i].toarray()[matrix[i].toarray() > 0]),
                np.sort(list(row.values())),
                rtol=1e-5,
            )
    expected = np.array(
        [
            [sum(weight * b.get(term, 0) for term, weight in a.items()) for b in rows_train]
            for rows_train, rows in [oracle(texts["train"], texts["test"])]
            for a in rows
        ]
    )
    np.testing.assert_allclose((found.queries @ found.train.T).toarray(), expected, atol=1e-5)


def test_features_of_all_texts_of_both_splits(data):
    found = features.tfidf(data, "test")
    assert found.train.shape[0] == len(data.train) and found.queries.shape[0] == len(data.test)
    np.testing.assert_allclose(sparse.linalg.norm(found.train, axis=1), 1, rtol=1e-5)


def test_ranks_of_sparse_scores():
    rng = np.random.default_rng()
    dense = rng.integers(0, 4, (30, 12)) / 4  # With ties, and rows with fewer than k entries.
    expected = np.full((30, 8), -1)
    for i, row in enumerate(dense):
        best = [j for j in sorted(range(12), key=lambda j: (-row[j], j)) if row[j]][:8]
        expected[i, : len(best)] = best
    np.testing.assert_array_equal(learners._rank(sparse.csr_matrix(dense), 8), expected)


def test_the_text_format_of_omikuji(tmp_path):
    rng = np.random.default_rng()
    values = sparse.random(20, 15, 0.2, "csr", np.float32, rng)
    values.data[:3] = [1e-7, 1.0, 1 / 3]
    labels = sparse.csr_matrix(rng.random((20, 6)) < 0.5, dtype=np.float32)
    learners._write_text(str(tmp_path / "train.txt"), values, labels)
    first, *lines = (tmp_path / "train.txt").read_text().splitlines()
    assert first == "20 15 6"
    for i, line in enumerate(lines):
        assert line == line.rstrip()
        true, *pairs = line.split(" ")
        assert true == ",".join(map(str, np.flatnonzero(labels[i].toarray())))
        row = np.zeros(15, np.float32)
        for pair in pairs:
            row[int(pair.split(":")[0])] = np.float32(pair.split(":")[1])
        np.testing.assert_array_equal(row, values[i].toarray()[0])


@pytest.mark.parametrize("by", ["text", "image", "both"])
def test_a_child_process_finds_what_this_one_finds(data, tmp_path, by):
    directory = written(tmp_path, data)
    found = baselines.run(f"knn_{by}", directory, "")
    expected = knn_baseline.predict(data, split="test", by=by, k=20)
    np.testing.assert_array_equal(found["ids"], expected.ids)
    assert found["train_s"] == 0 and found["predict_s"] > 0
    assert 20 < found["peak_bytes"] / 2**20 < 2000
    row = baselines.row_of(found, data, "test", 10)
    expected = evaluator.baselines(data, 10, "test")[f"kNN baseline, {by}"]
    expected = evaluator.measure(expected, data, "test")
    assert {name: row[name] for name in expected} == expected
    assert "train s" not in row and row["predict s"] > 0


def test_memory_is_that_of_the_child(data, tmp_path):
    directory = written(tmp_path, data)
    alone = baselines.run("knn_text", directory, "")["peak_bytes"]
    block = np.ones(1 << 26)  # 512 MiB in this process.
    again = baselines.run("knn_text", directory, "")["peak_bytes"]
    assert block.sum() and again < alone + 2**27


def test_filter_pairs_count_as_never_predicted(data):
    pairs = data.test_filter
    assert len(pairs) == 10
    ids = np.tile(np.arange(20, dtype=np.int32), (30, 1))
    found = {"ids": ids, "train_s": 2.0, "predict_s": 1.0, "peak_bytes": 2**30}
    row = baselines.row_of(found, data, "test", 5)
    true = data.test_relevance.toarray() > 0
    hits = 0
    for query in range(30):
        never = set(pairs[pairs[:, 0] == query, 1])
        hits += sum(true[query, label] for label in [x for x in range(20) if x not in never][:5])
    assert row["P@5"] == pytest.approx(100 * hits / 150)
    assert (row["train s"], row["predict s"], row["peak GiB"]) == (2, 1, 1)


def test_a_failed_learner_is_named_with_its_last_words(data, tmp_path, capsys):
    directory = written(tmp_path, data)
    os.remove(os.path.join(directory, "train_labels.npz"))
    assert baselines.run("bonsai", directory, "") is None
    line = capsys.readouterr().out
    assert line.startswith("warning: Bonsai, text: ended with status 1: ")
    assert "Error" in line


@pytest.mark.parametrize("name", NEEDS)
def test_linear_learners_learn(data, tmp_path, name):
    available, missing = NEEDS[name]
    if not available:
        pytest.skip(missing)
    found = baselines.run(name, written(tmp_path, data), PECOS_PYTHON)
    row = baselines.row_of(found, data, "test", 10)
    assert row["P@1"] >= 60 and row["R@10"] >= 60  # 10 of 60 true labels are filter pairs.
    true = data.test_relevance
    hits = [len(set(ids[:2]) & set(true[i].indices)) for i, ids in enumerate(found["ids"])]
    assert np.mean(hits) >= 1.8  # Of two labels: the words of a query name them.
    assert found["train_s"] > 0 and found["about"].endswith("beam 20")


def table(printed):
    """Rows of a printed table, by name, as dicts by column."""
    lines = printed.splitlines()
    top = next(i for i, line in enumerate(lines) if line.lstrip().startswith("P@1"))
    columns = re.split(r"  +", lines[top].strip())
    rows = {}
    for line in lines[top + 2 :]:
        name, *cells = re.split(r"  +", line)
        if len(cells) == len(columns):
            rows[name] = dict(zip(columns, cells, strict=True))
    return rows


def test_the_table_of_the_command(data, tmp_path, capsys):
    run = tmp_path / "run"
    json_files.write(
        run / "tower.json",
        {"family": "encoder", "tower": {}, "layout": {}, "content_hash": data.content_hash},
    )
    json_files.write(
        run / "evaluation" / "test-exact.json",
        {
            "P@1": 12.5,
            "R@100": 50.0,
            "with_neighbours": {"P@1": 25.0},
            "seconds": {"encode_queries": 2.0, "search": 1.0, "metrics": 9.0},
        },
    )
    lines = [
        {"step": 10, "step_time/step_s": 2.0, "step_time/peak_memory_gib": 3.0},
        {"step": 10, "valid/P@1": 3.0},
        {"step": 15, "step_time/step_s": 4.0, "step_time/peak_memory_gib": 2.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with flagsaver.flagsaver(data=data.path, baselines=["knn"], workdir=str(run)):
        baselines.main([])
    printed = capsys.readouterr().out
    rows = table(printed)
    assert list(rows) == [
        "kNN baseline, text",
        "kNN baseline, image",
        "kNN baseline, both",
        "this run",
        "this run, with neighbours",
    ]
    for by in ("text", "image", "both"):
        result = evaluator.baselines(data, 20, "test")[f"kNN baseline, {by}"]
        expected = evaluator.measure(result, data, "test")
        for column in ("P@1", "P@3", "PSP@5"):
            assert rows[f"kNN baseline, {by}"][column] == f"{expected[column]:.2f}"
    ours = rows["this run"]
    assert (ours["P@1"], ours["train s"], ours["predict s"]) == ("12.50", "40.00", "3.00")
    assert ours["peak GiB"] == "3.00" and rows["this run, with neighbours"]["P@1"] == "25.00"
    assert "30 queries, 20 labels, 200 training queries" in printed


def test_a_run_on_other_data_or_not_evaluated_is_refused(data, tmp_path):
    path = tmp_path / "tower.json"
    content = {"family": "encoder", "tower": {}, "layout": {}, "content_hash": "other"}
    json_files.write(path, content)
    with pytest.raises(InputError, match="trained on other data"):
        baselines.rows_of_run(str(tmp_path), data, "test")
    json_files.write(path, content | {"content_hash": data.content_hash})
    with pytest.raises(InputError, match=r"test-exact.json: not found; run: .*evaluate --workdir"):
        baselines.rows_of_run(str(tmp_path), data, "test")


def test_what_is_missing_is_left_out_with_a_line(data, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = baselines.chosen(list(baselines.BASELINES), data, "")
    assert names == ["knn_text", "knn_image", "knn_both"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("XR-Linear is left out") and "pip install libpecos==1.2.8" in first
    assert second.startswith("Parabel and Bonsai need omikuji: pip install 'vixml_jax[benchmark]'")
    with pytest.raises(InputError, match="--baselines=bonsai: none of them can run"):
        baselines.chosen(["bonsai"], data, "")
    with pytest.raises(InputError, match="--baselines=fastxml: expected some of knn, xr_linear"):
        baselines.chosen(["knn", "fastxml"], data, "")


@pytest.mark.parametrize("python", [sys.executable, "/does/not/exist"])
def test_an_interpreter_without_pecos_is_refused(data, python):
    if python == sys.executable and importlib.util.find_spec("pecos"):
        pytest.skip("this interpreter has libpecos")
    with pytest.raises(InputError, match=f"--pecos_python={python}: .*; expected an interpreter"):
        baselines.chosen(["xr_linear"], data, python)


def test_help_names_the_command():
    printed = tiny.run_command("benchmarks.baselines", "--help")
    assert "Usage: python -m vixml_jax.benchmarks.baselines [" in printed
