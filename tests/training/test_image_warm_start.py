"""Tests of the initial image projection, against the same regression by least squares."""

import numpy as np
from scipy import sparse

from vixml_jax.data.store import Items, PreparedDataset, Ragged
from vixml_jax.training import image_warm_start


def dataset(rng, n=60, labels=9, width=5, vocab=20):
    counts = rng.integers(0, 3, n)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    images = Ragged(rng.normal(size=(offsets[-1], width)).astype(np.float16), offsets)
    lengths = rng.integers(1, 6, labels)  # Up to 2 tokens: none is left out.
    at = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Ragged(rng.integers(0, vocab, at[-1]).astype(np.int32), at)
    dense = rng.random((n, labels)) < 0.3
    dense[:, 0] |= ~dense.any(axis=1)
    relevance = sparse.csr_matrix(dense, dtype=np.float32)
    no_filter = np.zeros((0, 2), np.int64)
    no_tokens = Ragged(np.zeros(0, np.int32), np.zeros(n + 1, int))
    queries = Items([""] * n, no_tokens, images)
    return PreparedDataset(
        "",
        {},
        queries,
        queries,
        Items([""] * labels, tokens, None),
        relevance,
        relevance,
        no_filter,
        no_filter,
    )


def test_projection_is_a_ridge_regression_with_scaled_deviations():
    rng = np.random.default_rng(0)
    data = dataset(rng)
    table = rng.normal(size=(20, 4)).astype(np.float32)
    kernel, bias = image_warm_start.regress_images(data, table, ridge=0.3, block=7)

    means = []
    for a, b in zip(data.labels.tokens.offsets[:-1], data.labels.tokens.offsets[1:], strict=True):
        tokens = data.labels.tokens.values[a:b]
        means.append(table[tokens[1:-1] if len(tokens) > 2 else tokens].mean(axis=0))
    targets = np.stack(
        [np.mean([means[j] for j in row.indices], axis=0) for row in data.train_relevance]
    )
    owner = np.repeat(np.arange(60), np.diff(data.train.images.offsets))
    x, y = data.train.images.values.astype(np.float64), targets[owner].astype(np.float64)
    # Ridge regression without a penalty on the bias: least squares on centred, augmented data.
    lam = 0.3 * np.sum(x**2) / x.shape[1]
    xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
    stacked = np.concatenate([xc, np.sqrt(lam) * np.eye(5)])
    unscaled = np.linalg.lstsq(stacked, np.concatenate([yc, np.zeros((5, 4))]), rcond=None)[0]
    scale = np.sqrt(
        np.var(table.astype(np.float64), axis=0).sum() / np.var(xc @ unscaled, axis=0).sum()
    )
    np.testing.assert_allclose(kernel, unscaled * scale, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(x @ kernel + bias, y.mean(axis=0) + xc @ unscaled * scale, atol=1e-4)


def test_data_without_images_have_no_projection():
    rng = np.random.default_rng(1)
    data = dataset(rng)
    empty = Items(
        data.train.texts, data.train.tokens, Ragged(np.zeros((0, 5), np.float16), np.zeros(61, int))
    )
    without = PreparedDataset(
        "",
        {},
        empty,
        empty,
        data.labels,
        data.train_relevance,
        data.train_relevance,
        data.train_filter,
        data.test_filter,
    )
    assert image_warm_start.regress_images(without, np.ones((20, 4), np.float32)) is None
