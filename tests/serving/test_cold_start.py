"""Vectors of new labels, against numpy computations from the run's own labels."""

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.serving import cold_start


def test_a_label_without_examples_gets_the_vector_of_its_text_and_images(predictor):
    texts, rng = ["label a3", "a1 b2", "ωφ"], np.random.default_rng()
    images = [rng.normal(size=12), None, rng.normal(size=(1, 12))]
    expected = predictor.encode(texts, images)
    np.testing.assert_array_equal(cold_start.label_vectors(predictor, texts, images), expected)
    found = cold_start.label_vectors(predictor, texts, images, [[], [], []])
    np.testing.assert_array_equal(found, expected)


def test_the_centroid_combines_examples_and_nearest_labels(predictor):
    rng = np.random.default_rng()
    texts = [f"label a{n} b{n}" for n in rng.permutation(10)[:6]]
    images = [rng.normal(size=12) if i % 2 else None for i in range(6)]
    examples = [[f"a{n % 10} b{n // 10}" for n in rng.integers(0, 100, i % 4)] for i in range(6)]
    found = cold_start.label_vectors(predictor, texts, images, examples)
    vectors = predictor.encode(texts, images)
    run_vectors = np.array(predictor.artifacts.vectors, np.float64)
    centroids = np.array(predictor.labels.centroids, np.float64)
    for label, queries in enumerate(examples):
        if not queries:
            np.testing.assert_array_equal(found[label], vectors[label])
            continue
        near = np.argsort(-run_vectors @ vectors[label], kind="stable")[:10]
        count = len(queries)
        mean = np.mean([predictor.encode([query])[0] for query in queries], axis=0)
        centroid = (count * mean + 3 * centroids[near].mean(axis=0)) / (count + 3)
        free = np.asarray(predictor.params["free"])[int(predictor.labels.cluster_of[near[0]])]
        expected = predictor.prototypes(
            texts[label : label + 1], images[label : label + 1], free[None], centroid[None]
        )
        np.testing.assert_allclose(found[label], expected[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "examples,message",
    [
        ([[], "a3 b4"], "label 1: its example queries are the text 'a3 b4', expected a list"),
        ([["a3 b4"]], "1 lists of example queries, expected 2"),
        ([], "0 lists of example queries, expected 2"),
    ],
)
def test_examples_of_the_wrong_shape_are_refused(predictor, examples, message):
    with pytest.raises(InputError, match=message):
        cold_start.label_vectors(predictor, ["label a1", "label b2"], None, examples)


def test_labels_of_the_run_are_reproduced(predictor):
    """With the combiner inputs of training, a prototype equals that of the run."""
    rows = np.random.default_rng().permutation(len(predictor.artifacts.ids))[:7]
    texts = [predictor.artifacts.texts[row] for row in rows]
    free, centroids = predictor.free_and_centroids(rows[:, None])
    found = predictor.prototypes(texts, None, free[:, 0], centroids[:, 0])
    np.testing.assert_allclose(found, np.array(predictor.artifacts.vectors)[rows], atol=1e-5)


def test_many_examples_outweigh_the_nearest_labels(predictor):
    queries = ["a3 b4"] * 500
    found = cold_start.label_vectors(predictor, ["label b9"], None, [queries])
    near = predictor.nearest_labels(predictor.encode(["label b9"]), 10)
    free, _ = predictor.free_and_centroids(near)
    centroid = predictor.encode(["a3 b4"])
    alone = predictor.prototypes(["label b9"], None, free[:, 0], centroid)
    assert (found @ alone.T)[0, 0] == pytest.approx(1, abs=1e-3)
