"""Files and report that `evaluate --report` writes for a trained run."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax.data.store import PreparedDataset
from vixml_jax.evaluation import bootstrap, per_query

KINDS = ("", "-neighbours", "-knn_text", "-knn_image", "-knn_both")


def run_module(name, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"vixml_jax.{name}", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a tiny run evaluated with neighbours and a report, and what was printed."""
    root = tmp_path_factory.mktemp("report")
    config = configuration(make_data(root, valid=0.2), root / "run")
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, knn_baseline=True),
        loop=dataclasses.replace(config.loop, epochs=1),
    )
    train.train(config)
    done = run_module("evaluate", f"--workdir={config.workdir}", "--report", "--knn.weight=0.3")
    assert done.returncode == 0, done.stderr
    return config, done.stdout


@pytest.fixture(scope="module")
def results(trained):
    path = os.path.join(trained[0].workdir, "evaluation", "test-exact.json")
    with open(path) as file:
        return json.load(file)


def read_queries(config, kind):
    path = os.path.join(config.workdir, "evaluation", f"test-exact{kind}.queries.npz")
    return per_query.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_per_query_average_to_the_metrics(trained, results, kind):
    queries, about = read_queries(trained[0], kind)
    dataset = PreparedDataset.open(trained[0].data)
    ids = dataset.info["arrays"]["test_ids"]["sha256"]
    assert about == (dataset.name, dataset.content_hash, "test", "exact", ids)
    assert len(queries.values) == len(dataset.test)
    rows = {"": results, "-neighbours": results["with_neighbours"]}
    for name, row in results["knn_baseline"].items():
        rows[f"-knn_{name.removeprefix('kNN baseline, ')}"] = row
    expected = {name: rows[kind][name] for name in queries.names}
    assert queries.metrics() == pytest.approx(expected, rel=1e-5)
    key = kind.lstrip("-") or "run"
    for name, bounds in bootstrap.intervals(queries).items():
        assert results["intervals"][key][name] == pytest.approx(bounds), name


def test_groups_agree_with_the_metrics(trained, results):
    dataset = PreparedDataset.open(trained[0].data)
    frequency = np.bincount(dataset.train_relevance.indices, minlength=20)
    groups = results["groups"]["run"]
    torso = groups["label frequency"]["torso"]
    assert torso["labels"] == np.count_nonzero((frequency > 5) & (frequency <= 100))
    assert sum(group["pairs"] for group in groups["label frequency"].values()) == (
        dataset.test_relevance.nnz
    )
    for kind in ("label frequency", "frequency decile"):
        total = sum(group["metrics"].get("P@5", 0.0) for group in groups[kind].values())
        unseen = groups["label frequency"].get("unseen", {}).get("metrics", {}).get("P@5", 0.0)
        if kind == "frequency decile":
            total += unseen
        assert total == pytest.approx(results["P@5"])
    assert {name: group["queries"] for name, group in groups["images"].items()} == (
        {"with images": 15, "without": 15}
    )
    lengths = groups["text length"].values()
    assert sum(group["queries"] for group in lengths) == 30


def test_report_shows_the_run(trained, results):
    config, printed = trained
    path = os.path.join(config.workdir, "evaluation", "test-exact.report.html")
    assert f"report written to {path}" in printed
    with open(path, encoding="utf-8") as file:
        text = file.read()
    served = results["with_neighbours"]  # By predict too, so the tiles show them.
    assert served["P@5"] != results["P@5"]
    for name in ("P@1", "P@5", "PSP@5", "nDCG@5"):
        assert f"<dt>{name}</dt><dd>{served[name]:.2f}" in text
    for expected in (
        "--report --knn.weight=0.3",
        "this run, text and images, with neighbours",
        "Learning curves",
        "Loss in training",
        "labels per training query",  # Charts of the data.
        "Label neighbours",
        "weight 0.3, k 100, temperature 0.05, joint no",
        "with A = 0.6 and B = 2.6",
        f"<dd>{results['peak_memory_gib']:.2f} GiB</dd>",
        "P@1 by images",
        PreparedDataset.open(config.data).content_hash,
    ):
        assert expected in text, expected
    assert "Recall and speed of the index" not in text  # Only for ScaNN.
    assert not [name for name in os.listdir(os.path.dirname(path)) if "tmp" in name]


def test_examples_are_what_predict_serves(trained, tmp_path):
    config, _ = trained
    with open(os.path.join(config.workdir, "evaluation", "test-exact.report.html")) as file:
        articles = re.findall("<article>(.*?)</article>", file.read(), re.DOTALL)
    assert len(articles) == 16
    queries, _ = read_queries(config, "-neighbours")
    dataset = PreparedDataset.open(config.data)
    values = {}
    for text, value in zip(dataset.test.texts, queries.column("nDCG@5"), strict=True):
        values.setdefault(text, set()).add(f"{100 * value:.1f}")
    rows = {}
    for article in articles:
        text, *labels = re.findall(r"<bdi>(.*?)</bdi>", article)
        assert re.search(r"nDCG@5 ([\d.]+)", article)[1] in values[text]
        if ">0 images" in article:
            rows[text] = labels[:5]
    assert rows
    source, out = tmp_path / "queries.jsonl", tmp_path / "predictions.jsonl"
    source.write_text("".join(json.dumps({"title": text}) + "\n" for text in rows))
    done = run_module(
        "predict", f"--workdir={config.workdir}", f"--queries={source}", f"--out={out}", "--k=5",
        "--knn.weight=0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["labels"] for line in out.read_text().splitlines()]
    assert [[label["text"] for label in labels] for labels in found] == list(rows.values())


def test_compare_reads_the_written_files(trained, tmp_path):
    config, _ = trained
    path = os.path.join(config.workdir, "evaluation", "test-exact-knn_text.queries.npz")
    out = tmp_path / "comparison.json"
    done = run_module("evaluation.compare", f"--runs={config.workdir},{path}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["metrics"]
    expected = bootstrap.compare(read_queries(config, "")[0], read_queries(config, "-knn_text")[0])
    assert found == {name: c._asdict() for name, c in expected.items()}
    assert f"written to {out}" in done.stdout and "30 queries" in done.stdout
    done = run_module("evaluation.compare", f"--runs={config.workdir},nowhere")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: nowhere/evaluation/test-exact.queries.npz: not found; python -m vixml_jax.evaluate "
        "--workdir=... writes it"
    )


def test_evaluate_loads_templates_only_for_a_report():
    code = "import sys, vixml_jax.evaluate; print({'jinja2', 'markdown_it'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
