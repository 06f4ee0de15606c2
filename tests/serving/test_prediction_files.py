"""Files of predictions: shared by processes, resumed where one was stopped, a line a query."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.service.conftest import unpack
from vixml_jax import saved_model
from vixml_jax.errors import InputError
from vixml_jax.serving import cold_start, label_updates, prediction_files, requests
from vixml_jax.serving.prediction_files import Request
from vixml_jax.serving.predictor import Predictor
from vixml_jax.serving.query_images import QueryImages
from vixml_jax.storage import digests, resumable
from vixml_jax.storage.resumable import Place

COUNT, BLOCK = 90, 8


class Stopped(BaseException):
    """Ends a process in the middle of its work."""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor.load(workdir, warm=False)


@pytest.fixture
def queries(tmp_path):
    path, rng = tmp_path / "queries.jsonl", np.random.default_rng()
    texts = [f"a{a} b{b}" for a, b in rng.integers(10, size=(COUNT, 2))]
    rows = [{"id": f"q{i}", "text": text} for i, text in enumerate(texts)]
    lines = [json.dumps(row) for row in rows]
    lines[7] = '{"id": "q7", "text": 5, '  # A row that cannot be read.
    path.write_text("\n".join(lines) + "\n")
    return path


def predict(predictor, queries, place, *, resume=True, stop_after=None, k=3):
    """Predicts the part of a process; ends it after a number of blocks."""
    images, blocks = QueryImages(predictor.image_width, None), []
    embed = images.embed

    def counted(block):
        if len(blocks) == stop_after:
            raise Stopped
        blocks.append(len(block))
        return embed(block)

    images.embed = counted
    request = Request(str(queries), k, -np.inf, "", place, resume, [])
    rows = requests.read_queries(str(queries), requests.Options())
    prediction_files.predict_file(predictor, images, rows, request)
    return blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(prediction_files, "_BLOCK", BLOCK)


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_id(rows):
    assert len({row["id"] for row in rows}) == len(rows) == COUNT  # Exactly one answer a query.
    return {row["id"]: row for row in rows}


def assert_same(rows, expected):
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert [x["id"] for x in row["labels"]] == [x["id"] for x in other["labels"]]
        scores = [[x["score"] for x in one["labels"]] for one in (row, other)]
        np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.fixture
def expected(predictor, queries, tmp_path):
    out = tmp_path / "expected.jsonl"
    predict(predictor, queries, Place(str(out)), resume=False)
    assert sorted(os.listdir(tmp_path)) == ["expected.jsonl", "queries.jsonl"]
    return rows_of(out)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_processes_share_the_queries(predictor, queries, expected, tmp_path, count):
    out = str(tmp_path / "out" / "p.jsonl")
    manifest = tmp_path / "out" / "p.manifest.json"
    for index in np.random.default_rng().permutation(count).tolist():
        assert not manifest.exists()
        predict(predictor, queries, Place(out, index, count))
    parts = [Place(out, index, count).part for index in range(count)]
    assert os.path.basename(parts[1]) == f"p-00001-of-{count:05d}.jsonl"
    found = [rows_of(part) for part in parts]
    whole = by_id([row for part in found for row in part])
    assert_same([whole[row["id"]] for row in expected], expected)
    about = json.loads(manifest.read_text())
    assert about["lines"] == COUNT
    for listed, part in zip(about["parts"], parts, strict=True):
        with open(part, "rb") as file:
            data = file.read()
        assert listed == {"file": os.path.basename(part), "lines": data.count(b"\n"),
                          "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip
    assert not [name for name in os.listdir(tmp_path / "out") if "unfinished" in name]


def test_parts_of_other_flags_are_named(predictor, queries, tmp_path, capsys):
    """The manifest never lists parts of different flags, and the one to be made anew is named."""
    out, manifest = str(tmp_path / "p.jsonl"), tmp_path / "p.manifest.json"
    for index in (0, 1):
        predict(predictor, queries, Place(out, index, 2))
    assert manifest.exists() and "other flags" not in capsys.readouterr().out
    predict(predictor, queries, Place(out, 1, 2), k=2)
    said = capsys.readouterr().out
    assert f"{Place(out, 0, 2).part}: predicted with other flags" in said
    assert not manifest.exists()
    predict(predictor, queries, Place(out, 1, 2), k=2)  # It was finished before.
    assert f"{Place(out, 0, 2).part}: predicted with other flags" in capsys.readouterr().out
    predict(predictor, queries, Place(out, 0, 2), k=2)
    assert manifest.exists() and "other flags" not in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2])
def test_a_stopped_process_goes_on(predictor, queries, expected, tmp_path, count):
    out = str(tmp_path / "p.jsonl")
    place = Place(out, count - 1, count)
    with pytest.raises(Stopped):
        predict(predictor, queries, place, stop_after=3)
    assert not os.path.exists(place.part)
    unfinished = place.part + ".unfinished"
    with open(unfinished, "ab") as file:  # As a process that is killed in a write leaves it.
        file.write(b'{"id": "half a li')
    blocks = predict(predictor, queries, place)
    own = [row for at, row in enumerate(expected) if at // BLOCK % count == place.index]
    assert sum(blocks) == len(own) - 3 * BLOCK
    assert_same(rows_of(place.part), own)
    # A finished part is left as it is; a damaged one is made again.
    before = os.stat(place.part).st_mtime_ns
    assert predict(predictor, queries, place) == []
    assert os.stat(place.part).st_mtime_ns == before
    with open(place.part, "r+b") as file:
        file.write(b"#")
    predict(predictor, queries, place)
    assert_same(rows_of(place.part), own)


@pytest.mark.parametrize("change", ["queries", "k", "labels"])
def test_what_was_predicted_of_something_else_is_not_gone_on_with(
    predictor, workdir, queries, tmp_path, change
):
    place, more = Place(str(tmp_path / "p.jsonl")), {}
    with pytest.raises(Stopped):
        predict(predictor, queries, place, stop_after=3)
    if change == "queries":
        lines = queries.read_text().split("\n")
        lines[0] = json.dumps({"id": "q0", "text": "a1 b2 a3"})
        queries.write_text("\n".join(lines))
    elif change == "k":
        more = {"k": 2}
    else:
        label_updates.remove(workdir, predictor.artifacts, ["3"])
        predictor.refresh()
    try:
        assert sum(predict(predictor, queries, place, **more)) == COUNT
        by_id(rows_of(place.part))
    finally:
        if change == "labels":
            label_updates.undo(workdir)
            predictor.refresh()


def test_predictions_of_another_model_of_the_same_step_are_not_kept(predictor, queries, tmp_path):
    place, workdir = Place(str(tmp_path / "p.jsonl")), unpack(tmp_path)
    predict(predictor, queries, place)
    with saved_model.opened(workdir) as saved:
        pathlib.Path(saved.path, "more").write_text("as if it were of other flags")
        digests.write_digests(saved.path)
    other = Predictor.load(workdir, warm=False)
    assert other.artifacts.about.step == predictor.artifacts.about.step
    assert sum(predict(other, queries, place)) == COUNT
    assert predict(other, queries, place) == []


def test_predictions_of_a_label_before_it_was_added_anew_are_not_kept(
    predictor, workdir, queries, tmp_path
):
    place = Place(str(tmp_path / "p.jsonl"))
    for text in ("a1", "b7"):
        cold_start.add_labels(predictor, ["new"], [text], None, [[]])
        predictor.refresh()
        try:
            assert sum(predict(predictor, queries, place)) == COUNT
        finally:
            label_updates.undo(workdir)
            predictor.refresh()


@pytest.mark.parametrize("line", ['{"id": ', "\0\0", "5", '{"error": "a"}', '{"best_score": "a"}',
                                  '{"note": []}'])  # fmt: skip
def test_damaged_lines_of_a_stopped_process_are_named(predictor, queries, tmp_path, line):
    place = Place(str(tmp_path / "p.jsonl"))
    with pytest.raises(Stopped):
        predict(predictor, queries, place, stop_after=2)
    lines = (tmp_path / "p.jsonl.unfinished").read_text().split("\n")
    lines[3] = line
    (tmp_path / "p.jsonl.unfinished").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"p\.jsonl\.unfinished, line 4: damaged; remove the file"):
        predict(predictor, queries, place)
    os.remove(place.unfinished)
    assert sum(predict(predictor, queries, place)) == COUNT


def test_two_processes_with_one_index(predictor, queries, tmp_path):
    place = Place(str(tmp_path / "p.jsonl"))
    with resumable.writing(place, "of"), pytest.raises(InputError, match="another process writes"):
        predict(predictor, queries, place)


def test_the_command_is_killed_and_goes_on(workdir, queries, tmp_path):
    with open(queries, "a", encoding="utf-8") as file:
        for i in range(COUNT, 6000):
            file.write(json.dumps({"id": f"q{i}", "text": f"a{i % 10} b{i // 10 % 10}"}) + "\n")
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "vixml_jax.predict", f"--workdir={workdir}",
               f"--queries={queries}", f"--out={out}", "--k=2", "--num_processes=2",
               "--process_index=1"]  # fmt: skip
    unfinished = tmp_path / "out-00001-of-00002.jsonl.unfinished"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (unfinished.exists() and unfinished.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = rows_of(tmp_path / "out-00001-of-00002.jsonl")
    own = [f"q{i}" for i in range(6000) if i // 1024 % 2 == 1]
    assert [row["id"] for row in rows] == own
    assert str(len(own)) in done.stdout
    done = subprocess.run([*command[:-1], "--process_index=2"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2 and "expected 0 to 1" in done.stderr
