"""The kNN baseline against plain loops in float64, including ties and missing images."""

import collections
import itertools
import math
import re
import types

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data.store import Items, Ragged
from vixml_jax.evaluation import knn_baseline

WORDS = np.array("red green blue car house tree Big big, small.".split())


def some_items(rng, count, width):
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 5))) for _ in range(count)]
    item_images = rng.integers(0, 3, count)
    values = rng.normal(size=(item_images.sum(), width)).astype(np.float16)
    return Items(texts, None, Ragged(values, np.cumsum([0, *item_images])))


def some_dataset(seed, *, train=60, test=23, labels=15):
    rng = np.random.default_rng(seed)
    relevance = sparse.csr_matrix((rng.random((train, labels)) < 0.15).astype(np.float32))
    return types.SimpleNamespace(
        train=some_items(rng, train, 6), test=some_items(rng, test, 6), train_relevance=relevance
    )


def text_cosines(dataset):
    split = [
        [collections.Counter(re.findall(r"\w+", text.lower())) for text in items.texts]
        for items in (dataset.train, dataset.test)
    ]
    known = set().union(*split[0])
    idf = {
        word: math.log((1 + len(split[0])) / (1 + sum(word in text for text in split[0]))) + 1
        for word in known
    }
    vectors = []
    for texts in split:
        rows = [{w: n * idf[w] for w, n in text.items() if w in known} for text in texts]
        for row in rows:
            length = math.sqrt(sum(x * x for x in row.values()))
            row.update({w: x / length for w, x in row.items()})
        vectors.append(rows)
    return np.array([[sum(x * b.get(w, 0.0) for w, x in a.items()) for b in vectors[0]]
                     for a in vectors[1]])  # fmt: skip


def image_cosines(dataset):
    vectors = []
    for items in (dataset.train, dataset.test):
        values, begin = items.images
        rows = []
        for a, b in itertools.pairwise(begin):
            mean = values[a:b].astype(np.float64).sum(axis=0)
            rows.append(mean / np.linalg.norm(mean) if b > a else mean)
        vectors.append(np.array(rows))
    return vectors[1] @ vectors[0].T


def ranked(cosines, relevance, k, neighbours):
    """Returns ids and scores of the baseline, by sorting everything."""
    ids = np.full((len(cosines), k), -1)
    scores = np.full((len(cosines), k), -np.inf)
    dense = relevance.toarray()
    for row, cosine in enumerate(np.round(cosines, 5)):
        near = np.argsort(-cosine, kind="stable")[:neighbours]
        total = (np.maximum(cosine[near], 1e-3)[:, None] ** 2 * dense[near]).sum(axis=0)
        order = [label for label in np.argsort(-total, kind="stable") if total[label] > 0][:k]
        ids[row, : len(order)] = order
        scores[row, : len(order)] = total[order]
    return ids, scores


@pytest.mark.parametrize("by", ["text", "image", "both"])
@pytest.mark.parametrize("k,neighbours", [(15, 20), (4, 5), (10, 100)])
def test_matches_a_plain_loop(by, k, neighbours):
    dataset = some_dataset(k)
    cosines = {"text": text_cosines(dataset), "image": image_cosines(dataset)}
    cosines["both"] = (cosines["text"] + cosines["image"]) / 2
    _, scores = ranked(cosines[by], dataset.train_relevance, k, min(neighbours, 60))
    found = knn_baseline.predict(
        dataset, by=by, k=k, neighbours=neighbours, query_block=7, train_block=16
    )
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3, atol=1e-5)
    assert found.ids.shape == found.scores.shape == (23, k)
    assert np.all((found.ids >= 0) == np.isfinite(found.scores))
    assert found.ids.dtype == np.int32 and found.scores.dtype == np.float32
    one_block = knn_baseline.predict(dataset, by=by, k=k, neighbours=neighbours)
    np.testing.assert_allclose(one_block.scores, found.scores, rtol=1e-4)


def test_ids_match_the_scores():
    dataset = some_dataset(3)
    ids, scores = ranked(image_cosines(dataset), dataset.train_relevance, 15, 20)
    found = knn_baseline.predict(dataset, by="image", k=15)
    gaps = np.abs(np.diff(np.where(np.isfinite(scores), scores, -1.0), axis=1)) > 1e-4
    clear = np.pad(gaps, ((0, 0), (1, 0)), constant_values=True)
    clear &= np.pad(gaps, ((0, 0), (0, 1)), constant_values=True)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found.ids[clear], ids[clear])


def test_validation_split_gives_the_same_result():
    dataset = some_dataset(4)
    expected = knn_baseline.predict(dataset, by="both", k=9)
    dataset.valid, dataset.test = dataset.test, None
    for one, other in zip(
        knn_baseline.predict(dataset, split="valid", by="both", k=9), expected, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("train_block", [1, 3, 4096])
def test_ties_go_to_the_first(train_block):
    train = Items(["a b", "a b", "b a", "c", "a b"], None, None)
    dataset = types.SimpleNamespace(
        train=train, test=Items(["b A!", "unheard"], None, None),
        train_relevance=sparse.csr_matrix(np.eye(5, 6, dtype=np.float32)[:, ::-1]),
    )  # fmt: skip
    found = knn_baseline.predict(dataset, k=4, neighbours=3, train_block=train_block)
    # Neighbours 0, 1, 2 have labels 5, 4, 3; equal scores are ranked by label.
    np.testing.assert_array_equal(found.ids, [[3, 4, 5, -1], [3, 4, 5, -1]])
    np.testing.assert_allclose(found.scores[:, :3], [[1.0] * 3, [1e-6] * 3], rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_top_matches_a_stable_sort(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (9, 30)).astype(np.float32)
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :7], axis=1)
    np.testing.assert_array_equal(knn_baseline._top(scores, 7), expected)
