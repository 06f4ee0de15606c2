"""Search with the first columns of vectors, against the formula in float64."""

import os

import numpy as np
import pytest

from vixml_jax.config import Config, LossConfig, SearchConfig
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.search import factory, fusion, scann
from vixml_jax.search.fusion import Fusion
from vixml_jax.search.prefix import Prefix

N, E, W = 70, 12, 5
FUSION = Fusion(7.0, 0.5, 0.3)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_parts(seed):
    """Prototypes, rows and biases of the head, queries and what the head reads of them."""
    rng = np.random.default_rng(seed)
    z, q, g = (unit(rng.normal(size=(n, E))).astype(np.float32) for n in (N, 9, 9))
    w = rng.normal(size=(N, E)).astype(np.float32)
    b, n = rng.normal(size=(2, N)).astype(np.float32)
    return z, fusion.HeadRows(w, b, n), q, g


def expected_scores(parts, width, fusion_weights):
    """S of each query and label, in float64; without weights, the cosines."""
    z, (w, b, n), q, g = parts
    z, w, b, n, q, g = (x.astype(np.float64) for x in (z, w, b, n, q, g))
    cosines = unit(q[:, :width]) @ unit(z[:, :width]).T
    if fusion_weights is None:
        return cosines
    a, c, t = fusion_weights
    return a * cosines + c * (20.0 * unit(g[:, :width]) @ w[:, :width].T + b) + t * n


@pytest.mark.parametrize("mesh", [None, "eight"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("width", [W, E, 0])
def test_scores_are_those_of_the_first_columns(width, fused, mesh):
    parts = random_parts(int(np.random.default_rng().integers(1e9)))
    z, head, q, g = parts
    vectors = fusion.LabelRows(z, head) if fused else z
    queries = fusion.query_vectors(q, g, FUSION) if fused else q
    index = factory.open_index(
        vectors,
        kind="exact",
        embedding=E,
        width=width,
        k=N,
        mesh=mesh and sharding.create_mesh(2, 4, 1),
    )
    found, log_sum = index.search_normalised(queries, N)
    scores = expected_scores(parts, width or E, FUSION if fused else None)
    assert (np.sort(found.ids, axis=1) == np.arange(N)).all()
    at = np.take_along_axis(scores, found.ids.astype(int), axis=1)
    # Sums of terms as large as the largest score, in float32.
    atol = 2e-6 * max(1.0, np.abs(scores).max())
    np.testing.assert_allclose(found.scores, at, rtol=2e-6, atol=atol)
    np.testing.assert_allclose(log_sum, np.log(np.exp(scores).sum(axis=1)), rtol=2e-6)
    np.testing.assert_array_equal(index.search(queries, N).ids, found.ids)


def test_fused_rows_are_read_as_they_are_made():
    z, head, *_ = random_parts(3)
    rows, whole = fusion.LabelRows(z, head), fusion.label_vectors(z, head)
    assert rows.shape == whole.shape and len(rows) == N
    np.testing.assert_array_equal(np.asarray(rows), whole)
    np.testing.assert_array_equal(rows[np.array([4, 1])], whole[[4, 1]])


def test_no_weight_leaves_no_score():
    """A part of a query that is zero stays zero."""
    q, g = random_parts(4)[2:]
    queries = Prefix(E, W).queries(fusion.query_vectors(q, g, Fusion(0.0, 1.0)))
    assert not queries[:, :W].any() and np.isfinite(queries).all()


@pytest.mark.skipif(bool(scann.unavailable_reason()), reason="needs ScaNN")
def test_scann_indexes_of_two_widths_have_directories_of_their_own(tmp_path):
    parts = random_parts(5)
    z, _, q, _ = parts
    directory = str(tmp_path / "labels")
    for _ in range(2):  # The second time, both are loaded.
        for width in (W, 0):
            index = factory.open_index(
                z, kind="scann", directory=directory, queries=q, k=5, width=width
            )
            scores = expected_scores(parts, width or E, None)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
            np.testing.assert_array_equal(index.search(q, 5).ids, best)
    assert sorted(os.listdir(tmp_path)) == ["labels", f"labels-width_{W}"]


def test_widths_are_checked(capsys):
    run = Config(loss=LossConfig(widths=[W]))
    for width in (0, W, E):
        factory.check("exact", SearchConfig(width=width, dtype="int8"), run, E)
    assert not capsys.readouterr().out
    factory.check("exact", SearchConfig(width=W + 1), run, E)
    assert f"the run was trained for {W}, {E}" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"--search.width={E + 1}: expected 0 to {E}"):
        factory.check("exact", SearchConfig(width=E + 1), run, E)
    with pytest.raises(InputError, match="int8: works with --search=exact only"):
        factory.check("scann", SearchConfig(dtype="int8"), run, E)
