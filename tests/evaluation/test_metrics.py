"""Metrics against loops over rows written from their definitions."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import sparse

from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import compute_metrics


def brute_force(ids, relevance, weights, ks, recall_ks):
    sums = {}

    def add(name, value):
        sums[name] = sums.get(name, 0.0) + value

    for row, true in zip(ids, relevance, strict=True):
        true = set(np.flatnonzero(true))
        hits = [i in true for i in row]
        best = sorted((weights[i] for i in true), reverse=True)
        for k in ks:
            ideal = sum(1 / math.log2(r + 2) for r in range(min(k, len(true))))
            add(f"P@{k}", sum(hits[:k]) / k)
            if true:
                add(f"nDCG@{k}", sum(h / math.log2(r + 2) for r, h in enumerate(hits[:k])) / ideal)
                add(
                    f"PSnDCG@{k}",
                    sum(h * weights[row[r]] / math.log2(r + 2) for r, h in enumerate(hits[:k]))
                    / ideal,
                )
                add(
                    f"PSnDCG@{k} best",
                    sum(w / math.log2(r + 2) for r, w in enumerate(best[:k])) / ideal,
                )
            add(f"PSP@{k}", sum(weights[row[r]] for r in range(k) if hits[r]))
            add(f"PSP@{k} best", sum(best[:k]))
        for k in recall_ks:
            add(f"R@{k}", sum(hits[:k]) / max(1, len(true)))
        add("MRR", next((1 / (r + 1) for r, h in enumerate(hits) if h), 0.0))
        top = max(ks)
        precision = [sum(hits[: r + 1]) / (r + 1) for r in range(top) if hits[r]]
        add(f"MAP@{top}", sum(precision) / max(1, min(top, len(true))))
    return {
        name: 100
        * (
            value / len(ids)
            if f"{name} best" not in sums
            else value / max(sums[f"{name} best"], 1e-300)
        )
        for name, value in sums.items()
        if not name.endswith(" best")
    }


@pytest.mark.parametrize("seed", range(4))
def test_metrics_match_brute_force(seed):
    rng = np.random.default_rng(seed)
    dense = rng.random((57, 40)) < 0.12
    dense[::9] = False
    ids = np.stack([rng.permutation(40)[:20] for _ in range(57)])
    ids[4, 7:] = -1
    ids[5] = -1
    weights = 1 + rng.random(40) * 9
    found = compute_metrics(
        ids, sparse.csr_matrix(dense, dtype=np.float32), weights, recall_ks=(10, 20)
    )
    expected = brute_force(ids, dense, weights, (1, 3, 5), (10, 20))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=25, deadline=None)
def test_bounds_and_perfect_rankings(seed):
    rng = np.random.default_rng(seed)
    dense = rng.random((20, 12)) < rng.random()
    weights = 1 + rng.random(12) * 9
    matrix = sparse.csr_matrix(dense, dtype=np.float32)
    perfect = np.argsort(-(dense * weights), axis=1, kind="stable")
    found = compute_metrics(perfect, matrix, weights, recall_ks=(10,))
    labelled = 100 * dense.any(axis=1).mean()
    for name in ("nDCG@5", "MRR", "MAP@5"):
        np.testing.assert_allclose(found[name], labelled)
    for name in ("PSP@3", "PSnDCG@5"):
        np.testing.assert_allclose(found[name], 100.0 if dense.any() else 0.0)
    random = np.stack([rng.permutation(12) for _ in range(20)])
    other = compute_metrics(random, matrix, weights, recall_ks=(10,))
    order = rng.permutation(20)
    again = compute_metrics(random[order], matrix[order], weights, recall_ks=(10,))
    for name, value in other.items():
        assert -1e-9 <= value <= 100 + 1e-9
        np.testing.assert_allclose(again[name], value)


def test_a_query_without_a_hit_has_reciprocal_rank_zero():
    relevance = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    ids = np.array([[0, 1], [0, 2], [1, 0]])
    found = compute_metrics(ids, relevance, np.ones(3), ks=(1,), recall_ks=())
    np.testing.assert_allclose(found["MRR"], 100 / 3)


def test_too_few_columns_are_refused():
    with pytest.raises(InputError, match="metrics at 10"):
        compute_metrics(np.zeros((2, 5), int), sparse.csr_matrix((2, 9)), np.ones(9))
