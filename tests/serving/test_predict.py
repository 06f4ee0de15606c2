"""The predict command: valid and invalid queries, label updates and their undo, wrong flags."""

import json
import shutil

import numpy as np
import pytest

from tests import tiny
from vixml_jax.serving.predictor import Predictor


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A copy of the run, which tests may change."""
    return shutil.copytree(run.workdir, tmp_path_factory.mktemp("predict") / "run")


def test_queries_are_predicted_in_order_and_invalid_ones_listed(workdir, predictor, tmp_path):
    first = predictor(["a1 b2"], k=1)[0][0].id
    vector = np.random.default_rng().normal(size=12).astype(np.float16)
    rows = [
        '{"id": "one", "text": "a1 b2"}',
        '{"id": "cut", "text": "a1',
        '{"id": "empty", "text": "  "}',
        '{"id": "strange", "text": "ωφ ψχ"}',
        json.dumps({"id": "image", "text": "a3", "embedding": vector.tolist()}),
        json.dumps({"id": "image alone", "text": "", "embedding": vector.tolist()}),
        '{"id": "narrow", "text": "a3", "embedding": [1, 2]}',
        '{"id": "missing", "text": "a3", "image": "nowhere.png"}',
        json.dumps({"id": "huge", "text": "a1 b2 " * 300_000}),
        json.dumps({"id": "filtered", "text": "a1 b2", "filter": [first, "no such label"]}),
    ]
    queries, out = tmp_path / "queries.jsonl", tmp_path / "predictions.jsonl"
    queries.write_text("\n".join(rows) + "\n", encoding="utf-8")
    filters = tmp_path / "filters.txt"
    ids = list(predictor.artifacts.ids)
    filters.write_text(f"huge\t{first}\n7.0\t{first}\n")
    printed = tiny.run_command(
        "predict", f"--workdir={workdir}", f"--queries={queries}", f"--out={out}", "--k=4",
        f"--filters={filters}",
    )  # fmt: skip
    assert f"8 of 10 queries predicted, up to 4 labels each: {out}" in printed
    assert f"{filters}: 1 of 2 query ids are of no query, such as '7.0'" in printed
    assert "invalid query in line 2: " in printed and "invalid query in line 3: " in printed
    found = rows_of(out)
    names = ["one", None, "empty", "strange", "image", "image alone", "narrow", "missing"]
    assert [row["id"] for row in found] == [*names, "huge", "filtered"]
    by_id = {row["id"]: row for row in found}
    expected = predictor(
        ["a1 b2", "a3", "", "a3", "ωφ ψχ"], [None, vector, vector, None, None], k=4
    )
    for name, row in zip(
        ["one", "image", "image alone", "narrow", "strange"], expected, strict=True
    ):
        assert [x["id"] for x in by_id[name]["labels"]] == [x.id for x in row]
        scores = [x["score"] for x in by_id[name]["labels"]]
        np.testing.assert_allclose(scores, [x.score for x in row], rtol=1e-4)
    assert by_id[None]["line"] == 2 and by_id[None]["labels"] == []
    assert by_id["empty"]["error"] == "neither text nor image; expected one of them"
    assert by_id["strange"]["note"] == "the text has no token that the tokenizer knows"
    note = "the image is ignored: its embedding has width 2, expected 12"
    assert by_id["narrow"]["note"] == note
    assert by_id["missing"]["note"].startswith("image files are ignored")
    huge = [x.id for x in predictor(["a1 b2 " * 100], k=4, never=[[first]])[0]]
    assert [x["id"] for x in by_id["huge"]["labels"]] == huge
    assert by_id["filtered"]["note"] == "unknown label 'no such label' in the filter"
    assert [x["id"] for x in by_id["filtered"]["labels"]] == [
        x.id for x in predictor(["a1 b2"], k=4, never=[[first]])[0]
    ]
    for row in found:
        assert all(x["id"] in ids and set(x) == {"id", "text", "score"} for x in row["labels"])


def test_labels_are_added_found_listed_and_undone(workdir, tmp_path):
    queries, out = tmp_path / "queries.csv", tmp_path / "predictions.jsonl"
    queries.write_text("text\nquite new\n")
    new = tmp_path / "new.jsonl"
    new.write_text(
        json.dumps({"id": "n1", "text": "quite new", "examples": ["quite new", "new quite"]})
        + '\n{"id": "n2", "text": "a1 b2"}\n'
    )

    def top(*more):
        tiny.run_command(
            "predict", f"--workdir={workdir}", f"--queries={queries}", f"--out={out}", "--k=50",
            "--knn.weight=0", *more,
        )  # fmt: skip
        return [label["id"] for label in rows_of(out)[0]["labels"]]

    before = top()
    assert len(before) == 20
    printed = tiny.run_command("predict", f"--workdir={workdir}", f"--add_labels={new}")
    expected = "2 labels added, 1 with example queries; the run has 22 labels now"
    assert expected in printed
    removed = tmp_path / "removed.txt"
    removed.write_text(f"{before[0]}\nn2\n")
    printed = tiny.run_command("predict", f"--workdir={workdir}", f"--remove_labels={removed}")
    assert "2 labels removed; the run has 20 labels now" in printed
    after = top()
    assert len(after) == 20 and "n1" in after and "n2" not in after and before[0] not in after
    assert top("--search=scann") == after
    printed = tiny.run_command("evaluate", f"--workdir={workdir}")
    assert "labels that predict added or removed are ignored" in printed
    assert "2 label updates" in tiny.run_command(
        "predict", f"--workdir={workdir}", "--list_changes"
    )
    error = tiny.run_command("predict", f"--workdir={workdir}", f"--add_labels={new}", status=2)
    assert error.count("\n") == 1 and "label 'n1' exists already" in error
    for update in ("removal", "addition"):
        printed = tiny.run_command("predict", f"--workdir={workdir}", "--undo")
        assert printed == f"undone: {update} of 2 labels\n"
    assert top() == before


def refused(workdir, name, path, *more):
    error = tiny.run_command("predict", f"--workdir={workdir}", f"--{name}={path}", *more, status=2)
    assert error.count("\n") == 1, error
    return error


def test_wrong_input_is_refused_with_one_line(workdir, tmp_path):
    twice = tmp_path / "twice.csv"
    twice.write_text("id,text\nx,one\ny,two\nx,three\n")
    assert "line 4: duplicate label 'x', first in line 2" in refused(workdir, "add_labels", twice)
    for content, expected in (
        ("text\none\n", "no id column found among 'text'"),
        ("id,text\nx,one\n,two\n", "line 3: no id"),
        ('id,text\nx,one\ny," "\n', "line 3: neither text nor image"),
        ("id,text,image\nx,,nowhere.png\n", "line 2: image files are ignored: "),
    ):
        bad = tmp_path / "bad.csv"
        bad.write_text(content)
        assert expected in refused(workdir, "add_labels", bad)
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("0\nx\n")
    assert "line 2: the run has no label 'x'" in refused(workdir, "remove_labels", unknown)
    assert "--out: missing" in refused(workdir, "queries", twice)
    assert "the same file as --queries" in refused(workdir, "queries", twice, f"--out={twice}")
    assert "Is a directory" in refused(workdir, "queries", twice, f"--out={tmp_path}")
    filters = tmp_path / "filters.txt"
    filters.write_text("q1 label a1\n")
    out = f"--out={tmp_path / 'out.jsonl'}"
    assert "no such file" in refused(workdir, "queries", tmp_path / "none.csv", out)
    assert f"{filters}, line 1: " in refused(workdir, "queries", twice, out, f"--filters={filters}")
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_is_written_if_no_query_is_valid(workdir, tmp_path):
    empty, out = tmp_path / "empty.csv", tmp_path / "out.jsonl"
    empty.write_text('id,text\n1," "\n2," "\n')
    out.write_text("old")
    error = refused(workdir, "queries", empty, f"--out={out}")
    assert "none of the 2 rows is a valid query" in error
    assert out.read_text() == "old"


def test_the_package_exports_the_predictor(run):
    import vixml_jax

    assert vixml_jax.Predictor is Predictor
    with pytest.raises(AttributeError, match="Nothing"):
        _ = vixml_jax.Nothing
