"""The door that answers: good rows, bad ones, labels added and taken back, and what it refuses."""

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
    """A copy of the run that may be changed."""
    return shutil.copytree(run.workdir, tmp_path_factory.mktemp("door") / "run")


def test_rows_are_answered_in_order_and_bad_ones_listed(workdir, predictor, tmp_path):
    first = predictor(["a1 b2"], k=1)[0][0].id
    vector = np.random.default_rng().normal(size=12).astype(np.float16)
    rows = [
        '{"id": "one", "text": "a1 b2"}',
        '{"id": "cut", "text": "a1',
        '{"id": "empty", "text": "  "}',
        '{"id": "strange", "text": "ωφ ψχ"}',
        json.dumps({"id": "picture", "text": "a3", "embedding": vector.tolist()}),
        json.dumps({"id": "picture alone", "text": "", "embedding": vector.tolist()}),
        '{"id": "narrow", "text": "a3", "embedding": [1, 2]}',
        '{"id": "missing", "text": "a3", "image": "nowhere.png"}',
        json.dumps({"id": "huge", "text": "a1 b2 " * 300_000}),
        json.dumps({"id": "filtered", "text": "a1 b2", "filter": [first, "no such label"]}),
    ]
    queries, out = tmp_path / "queries.jsonl", tmp_path / "answers.jsonl"
    queries.write_text("\n".join(rows) + "\n", encoding="utf-8")
    filters = tmp_path / "filters.txt"
    ids = list(predictor.answers.ids)
    filters.write_text(f"huge\t{first}\n")
    said = tiny.door(
        "predict", f"--workdir={workdir}", f"--queries={queries}", f"--out={out}", "--k=4",
        f"--filters={filters}",
    )  # fmt: skip
    assert f"8 of 10 queries answered, up to 4 labels each: {out}" in said
    assert "not answered: line 2: " in said and "not answered: line 3: " in said
    found = rows_of(out)
    names = ["one", None, "empty", "strange", "picture", "picture alone", "narrow", "missing"]
    assert [row["id"] for row in found] == [*names, "huge", "filtered"]
    by_id = {row["id"]: row for row in found}
    expected = predictor(
        ["a1 b2", "a3", "", "a3", "ωφ ψχ"], [None, vector, vector, None, None], k=4
    )
    for name, row in zip(
        ["one", "picture", "picture alone", "narrow", "strange"], expected, strict=True
    ):
        assert [x["id"] for x in by_id[name]["labels"]] == [x.id for x in row]
        scores = [x["score"] for x in by_id[name]["labels"]]
        np.testing.assert_allclose(scores, [x.score for x in row], rtol=1e-4)
    assert by_id[None]["line"] == 2 and by_id[None]["labels"] == []
    assert by_id["empty"]["error"] == "neither text nor picture: nothing to search with"
    assert by_id["strange"]["note"] == "no word of it is known"
    assert by_id["narrow"]["note"] == "the picture's embedding is 2 wide, expected 12"
    assert by_id["missing"]["note"].startswith("picture files are not read")
    huge = [x.id for x in predictor(["a1 b2 " * 100], k=4, never=[[first]])[0]]
    assert [x["id"] for x in by_id["huge"]["labels"]] == huge
    assert by_id["filtered"]["note"] == "filter: 'no such label' is not among the labels"
    assert [x["id"] for x in by_id["filtered"]["labels"]] == [
        x.id for x in predictor(["a1 b2"], k=4, never=[[first]])[0]
    ]
    for row in found:
        assert all(x["id"] in ids and set(x) == {"id", "text", "score"} for x in row["labels"])


def test_labels_are_added_found_listed_and_taken_back(workdir, tmp_path):
    queries, out = tmp_path / "queries.csv", tmp_path / "answers.jsonl"
    queries.write_text("text\nquite new\n")
    new = tmp_path / "new.jsonl"
    new.write_text(
        json.dumps({"id": "n1", "text": "quite new", "examples": ["quite new", "new quite"]})
        + '\n{"id": "n2", "text": "a1 b2"}\n'
    )

    def top(*more):
        tiny.door(
            "predict", f"--workdir={workdir}", f"--queries={queries}", f"--out={out}", "--k=50",
            "--memory_weight=0", *more,
        )  # fmt: skip
        return [label["id"] for label in rows_of(out)[0]["labels"]]

    before = top()
    assert len(before) == 20
    said = tiny.door("predict", f"--workdir={workdir}", f"--add_labels={new}")
    assert "2 labels added, 1 of them with example queries; the run has 22 now" in said
    gone = tmp_path / "gone.txt"
    gone.write_text(f"{before[0]}\nn2\n")
    said = tiny.door("predict", f"--workdir={workdir}", f"--remove_labels={gone}")
    assert "2 labels removed; the run has 20 now" in said
    after = top()
    assert len(after) == 20 and "n1" in after and "n2" not in after and before[0] not in after
    assert top("--search=scann") == after
    assert "not those that predict added" in tiny.door("evaluate", f"--workdir={workdir}")
    assert "labels were changed 2 times" in tiny.door(
        "predict", f"--workdir={workdir}", "--list_changes"
    )
    said = tiny.door("predict", f"--workdir={workdir}", f"--add_labels={new}", status=2)
    assert said.count("\n") == 1 and "'n1' is in the run already" in said
    for _ in range(2):
        assert "taken back" in tiny.door("predict", f"--workdir={workdir}", "--undo")
    assert top() == before


def refused(workdir, name, path, *more):
    said = tiny.door("predict", f"--workdir={workdir}", f"--{name}={path}", *more, status=2)
    assert said.count("\n") == 1, said
    return said


def test_what_is_refused_is_refused_in_one_line(workdir, tmp_path):
    twice = tmp_path / "twice.csv"
    twice.write_text("id,text\nx,one\ny,two\nx,three\n")
    assert "line 4: label 'x' is there already, in line 2" in refused(workdir, "add_labels", twice)
    for content, said in (
        ("text\none\n", "which column is the id? found text"),
        ("id,text\nx,one\n,two\n", "line 3: no id"),
        ('id,text\nx,one\ny," "\n', "line 3: neither text nor picture: nothing to place"),
        ("id,text,image\nx,,nowhere.png\n", "line 2: picture files are not read: "),
    ):
        bad = tmp_path / "bad.csv"
        bad.write_text(content)
        assert said in refused(workdir, "add_labels", bad)
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("0\nx\n")
    assert "line 2: the run has no label 'x'" in refused(workdir, "remove_labels", unknown)
    assert "--out: missing" in refused(workdir, "queries", twice)
    assert "is --queries" in refused(workdir, "queries", twice, f"--out={twice}")
    assert "Is a directory" in refused(workdir, "queries", twice, f"--out={tmp_path}")
    filters = tmp_path / "filters.txt"
    filters.write_text("q1 label a1\n")
    out = f"--out={tmp_path / 'out.jsonl'}"
    assert "no such file" in refused(workdir, "queries", tmp_path / "none.csv", out)
    assert f"{filters}, line 1: " in refused(workdir, "queries", twice, out, f"--filters={filters}")
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_of_which_none_can_be_answered_leave_nothing(workdir, tmp_path):
    empty, out = tmp_path / "empty.csv", tmp_path / "out.jsonl"
    empty.write_text('id,text\n1," "\n2," "\n')
    out.write_text("as it was")
    said = refused(workdir, "queries", empty, f"--out={out}")
    assert "none of 2 rows can be answered" in said
    assert out.read_text() == "as it was"


def test_the_library_is_three_lines(run):
    import vixml_jax

    assert vixml_jax.Predictor is Predictor
    with pytest.raises(AttributeError, match="Nothing"):
        _ = vixml_jax.Nothing
