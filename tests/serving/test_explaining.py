"""Explanations: their parts add up to the scores, and neighbours are the nearest queries."""

import shutil

import numpy as np
import pytest

from vixml_jax.serving import explaining, label_updates
from vixml_jax.serving.predictor import Predictor

TEXTS = ("a3 b4", "b7 a1 a2", "a9")


@pytest.fixture(scope="module")
def of_head(head_run):
    return Predictor.load(head_run.workdir, warm=False)


def nearest(predictor, text):
    similarities = predictor.artifacts.train_vectors @ predictor.encode([text])[0]
    return np.sort(similarities)[::-1]


@pytest.mark.parametrize("text", TEXTS)
def test_parts_of_a_head_with_neighbours(of_head, text):
    found = explaining.explain(of_head, text, k=7)
    expected = of_head([text], k=7)[0]
    assert [x.label.id for x in found.labels] == [x.id for x in expected]
    np.testing.assert_allclose(
        [x.label.score for x in found.labels], [x.score for x in expected], rtol=1e-4
    )
    # The probabilities without neighbours, from the logits of all labels in float64.
    queries = of_head.queries([text])
    rows = np.arange(len(of_head.artifacts.ids))
    logits = of_head.label_vectors(rows).astype(np.float64) @ of_head.query_vectors(queries)[0]
    alone = np.exp(logits - logits.max())
    alone /= alone.sum()
    for one in found.labels:
        row = of_head.row_of(one.label.id)
        assert one.prototype + one.head == pytest.approx(logits[row], rel=1e-4)
        assert one.label.score - one.neighbours == pytest.approx(alone[row], rel=1e-3, abs=1e-6)
    vectors = of_head.fusion.prototypes * (of_head.artifacts.vectors @ queries.vectors[0])
    for one in found.labels:
        assert one.prototype == pytest.approx(vectors[of_head.row_of(one.label.id)], rel=1e-4)
    assert any(abs(one.neighbours) > 1e-4 for one in found.labels)


def test_neighbours_are_the_nearest_training_queries(of_head):
    found = explaining.explain(of_head, TEXTS[0], num_neighbours=4).neighbours
    expected = nearest(of_head, TEXTS[0])[:4]
    np.testing.assert_allclose([x.similarity for x in found], expected, atol=1e-5)
    relevance = of_head.artifacts.train_relevance
    for near in found:
        rows = relevance[near.row].indices
        assert near.labels == [of_head.artifacts.texts[row] for row in rows]
        own = of_head.artifacts.train_vectors[near.row] @ of_head.encode([TEXTS[0]])[0]
        assert near.similarity == pytest.approx(own, abs=1e-5)


def test_a_run_without_a_head(predictor):
    found = explaining.explain(predictor, TEXTS[1], k=3)
    queries = predictor.encode([TEXTS[1]])
    for one in found.labels:
        row = np.array([predictor.row_of(one.label.id)])
        assert one.prototype == pytest.approx(
            float(predictor.label_vectors(row)[0] @ queries[0]), abs=1e-5
        )
        assert one.head is None and one.neighbours is None
    assert len(found.neighbours) == 5


def test_filters_images_and_removed_labels(of_head):
    best = explaining.explain(of_head, TEXTS[0], k=3).labels
    image = np.random.default_rng(0).normal(size=of_head.image_width)
    assert explaining.explain(of_head, TEXTS[0], image).labels != best
    filtered = explaining.explain(of_head, TEXTS[0], k=2, never=[best[0].label.id]).labels
    assert [x.label.id for x in filtered] == [x.label.id for x in best[1:]]


def test_neighbours_without_mixing(head_run):
    """A head keeps the vectors of training queries, whether or not they change scores."""
    predictor = Predictor.load(head_run.workdir, warm=False, with_neighbours=False)
    found = explaining.explain(predictor, TEXTS[0])
    assert len(found.neighbours) == 5
    assert all(one.neighbours is None for one in found.labels)


def test_labels_that_are_refreshed_meanwhile_do_not_count(run, tmp_path, monkeypatch):
    """All parts of an explanation are of the labels of one moment."""
    workdir = str(shutil.copytree(run.workdir, tmp_path / "run"))
    predictor = Predictor.load(workdir, warm=False)
    expected, encode = explaining.explain(predictor, TEXTS[0], k=20), predictor.queries
    near = expected.labels[0].label
    vector = np.array(predictor.artifacts.vectors[[predictor.row_of(near.id)]])

    def slow_encode(*arguments):
        label_updates.add(workdir, predictor.artifacts, ["new"], ["new"], vector)
        label_updates.remove(workdir, predictor.artifacts, [near.id])
        predictor.refresh()
        return encode(*arguments)

    monkeypatch.setattr(predictor, "queries", slow_encode)
    assert explaining.explain(predictor, TEXTS[0], k=20) == expected
    assert predictor.row_of("new") is not None and predictor.row_of(near.id) is None
