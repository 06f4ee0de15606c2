"""Labels added to and removed from a run: what is found then, saved steps, and undo."""

import json
import os
import shutil

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import sealed
from vixml_jax.structs import Queries


@pytest.fixture
def workdir(run, tmp_path):
    """A copy of the run, which tests may change."""
    return shutil.copytree(run.workdir, tmp_path / "run")


def opened(workdir):
    """A predictor without training neighbours, so that scores are cosines."""
    predictor = Predictor.load(str(workdir), warm=False)
    predictor.mixing = None
    return predictor


def random_vectors(rng, count, width):
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_search_equals_that_over_the_current_labels(workdir):
    rng = np.random.default_rng()
    predictor = opened(workdir)
    names = [*predictor.artifacts.ids]
    vectors = [*np.array(predictor.artifacts.vectors)]
    live = dict(zip(names, vectors, strict=True))
    for turn in range(5):
        if turn % 2:
            removed = rng.choice(list(live), 3, replace=False).tolist()
            label_updates.remove(str(workdir), predictor.artifacts, removed)
            for name in removed:
                del live[name]
        else:
            new = [f"new {turn} {i}" for i in range(4)]
            more = random_vectors(rng, 4, len(vectors[0]))
            label_updates.add(str(workdir), predictor.artifacts, new, new, more)
            live |= dict(zip(new, more, strict=True))
        predictor.refresh()
        assert predictor.num_labels == len(live)
        queries = random_vectors(rng, 7, len(vectors[0]))
        expected = np.stack(list(live.values())).astype(np.float64) @ queries.T
        found = predictor.search(Queries(queries), len(live) + 2)
        assert (found.ids[:, -2:] < 0).all()
        for row, ids, scores in zip(expected.T, found.ids, found.scores, strict=True):
            np.testing.assert_allclose(scores[:-2], np.sort(row)[::-1], atol=1e-6)
            score_of = dict(zip(live, row, strict=True))
            for label, score in zip(ids[:-2], scores, strict=False):
                assert score_of[predictor.label(label)[0]] == pytest.approx(score, abs=1e-6)
    again = opened(workdir).search(Queries(queries), 5)
    np.testing.assert_array_equal(again.ids, found.ids[:, :5])


def test_a_removed_label_can_be_added_again(workdir):
    predictor = opened(workdir)
    name = predictor.artifacts.ids[3]
    vector = np.array(predictor.artifacts.vectors[3:4])
    label_updates.remove(str(workdir), predictor.artifacts, [name])
    predictor.refresh()
    assert predictor.row_of(name) is None
    label_updates.add(str(workdir), predictor.artifacts, [name], ["another text"], vector)
    predictor.refresh()
    assert predictor.label(predictor.row_of(name)) == (name, "another text")
    assert predictor.search(Queries(vector), 1).ids[0, 0] == predictor.row_of(name)


def test_a_label_may_be_named_twice_to_be_removed(workdir):
    predictor = opened(workdir)
    names = [predictor.artifacts.ids[i] for i in (4, 2, 4)]
    path = label_updates.remove(str(workdir), predictor.artifacts, names)
    assert label_updates.describe(path).ids == names[:2]
    predictor.refresh()
    assert predictor.num_labels == len(predictor.artifacts.ids) - 2
    assert [predictor.row_of(name) for name in names] == [None] * 3


def test_undo_takes_back_the_last_step_first(workdir):
    predictor = opened(workdir)
    before = predictor(["a1 b2"], k=9)
    ids = [predictor.artifacts.ids[i] for i in (2, 5)]
    new = random_vectors(np.random.default_rng(), 1, predictor.artifacts.vectors.shape[1])
    label_updates.remove(str(workdir), predictor.artifacts, ids)
    label_updates.add(str(workdir), predictor.artifacts, ["x"], ["x"], new)
    assert label_updates.undo(str(workdir)).kind == label_updates.ADD
    assert label_updates.undo(str(workdir)).ids == ids
    predictor.refresh()
    assert predictor(["a1 b2"], k=9) == before
    retired = label_updates.remove(str(workdir), predictor.artifacts, ids) + ".undone"
    os.makedirs(os.path.join(retired, "left by a killed process"))
    label_updates.undo(str(workdir))
    with pytest.raises(InputError, match="--undo: no labels were added"):
        label_updates.undo(str(workdir))


def test_steps_of_another_model_and_damaged_ones_are_refused(workdir):
    predictor = opened(workdir)
    path = label_updates.remove(str(workdir), predictor.artifacts, [predictor.artifacts.ids[0]])
    about = os.path.join(path, label_updates.ABOUT)
    with open(about, encoding="utf-8") as file:
        text = file.read()
    fields = json.loads(text)
    sealed.write(about, {**fields, "step": 9})
    with pytest.raises(InputError, match=r"000001: made for the model of step 9"):
        opened(workdir)
    with open(about, "w", encoding="utf-8") as file:
        file.write(text[:-9])
    with pytest.raises(InputError, match=r"change.json: .* remove"):
        opened(workdir)
    for row in (-1, 1, 20, 10**30):
        sealed.write(about, {**fields, "rows": [row]})
        with pytest.raises(InputError, match=r"change.json: .* remove"):
            opened(workdir)
    with open(about, "w", encoding="utf-8") as file:
        json.dump({**fields, "rows": [1]}, file)
    with pytest.raises(InputError, match=r"change.json: damaged .* remove"):
        opened(workdir)


def test_vectors_of_another_shape_are_refused(workdir):
    artifacts = opened(workdir).artifacts
    vectors = np.zeros((1, artifacts.vectors.shape[1] + 1), np.float32)
    vectors[:, 0] = 1.0
    label_updates.add(str(workdir), artifacts, ["x"], ["label x"], vectors)
    with pytest.raises(InputError, match=r"000001: damaged \(vectors \(1, 17\) .* remove"):
        opened(workdir)


def test_an_unfinished_step_is_ignored(workdir, monkeypatch):
    predictor = opened(workdir)
    monkeypatch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        label_updates.add(str(workdir), predictor.artifacts, ["x"], ["x"], np.eye(16)[:1])
    assert label_updates.steps(str(workdir)) == []


def test_added_labels_are_found_with_training_neighbours(workdir):
    predictor = Predictor.load(str(workdir), warm=False)
    assert predictor.mixing is not None
    vector = predictor.encode(["a1 b2"])
    label_updates.add(str(workdir), predictor.artifacts, ["x"], ["x"], vector)
    predictor.refresh()
    assert "x" in [label.id for label in predictor(["a1 b2"], k=3)[0]]


def test_training_neighbours_do_not_bring_removed_labels_back(workdir):
    predictor = Predictor.load(str(workdir), warm=False)
    before = predictor(["a1 b2"], k=20)[0]
    removed = {label.id for label in before[:3]}
    label_updates.remove(str(workdir), predictor.artifacts, list(removed))
    predictor.refresh()
    after = predictor(["a1 b2"], k=20)[0]
    assert {label.id for label in after} == {label.id for label in before} - removed
