"""Search over vectors of 8 bits, against exact search in float64."""

import jax
import numpy as np
import pytest

from tests.search.test_prefix import unit
from vixml_jax.parallel import sharding
from vixml_jax.search import factory, fusion, int8
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.fusion import Fusion
from vixml_jax.search.prefix import Prefix

N, E, W = 3000, 32, 24
FUSION = Fusion(10.0, 1.0, 0.3)


def clustered(rng, count, centres):
    """Unit vectors around centres, as those of a trained tower."""
    return unit(centres[rng.integers(len(centres), size=count)] + rng.normal(size=(count, E)) / 8)


def make(fused, seed):
    """Label vectors and query vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, E)) / np.sqrt(E)
    z, q, g, w = (clustered(rng, n, centres).astype(np.float32) for n in (N, 40, 40, N))
    if not fused:
        return z, q
    w *= rng.uniform(0.5, 2.0, size=(N, 1)).astype(np.float32)
    b = rng.normal(-5.0, 2.0, size=N).astype(np.float32)
    log_count = np.log1p(rng.integers(0, 1000, N)).astype(np.float32)
    return fusion.LabelRows(z, fusion.HeadRows(w, b, log_count)), fusion.query_vectors(q, g, FUSION)


@pytest.mark.parametrize("mesh", [None, "eight"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("width", [0, W])
def test_the_best_have_exact_scores(fused, mesh, width):
    vectors, queries = make(fused, int(np.random.default_rng().integers(1e9)))
    index = factory.open_index(
        vectors, kind="exact", embedding=E, width=width, dtype="int8", k=10, label_block=1024,
        mesh=mesh and sharding.create_mesh(2, 4, 1),
    )  # fmt: skip
    prefix = Prefix(E, width or E)
    rows, searching = prefix.read(vectors), prefix.queries(queries)
    scores = searching.astype(np.float64) @ rows.astype(np.float64).T
    found, log_sum = index.search_normalised(queries, 10)
    best = np.argsort(-scores, axis=1)[:, :10]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(best, found.ids, strict=True)]) > 0.998
    at = np.take_along_axis(scores, found.ids.astype(int), axis=1)
    # Sums of terms as large as the largest score, in float32.
    atol = 2e-6 * max(1.0, np.abs(scores).max())
    np.testing.assert_allclose(found.scores, at, rtol=2e-6, atol=atol)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    # Scores of labels that are not among the 40 best are rounded; their errors average out.
    largest = scores.max(axis=1, keepdims=True)
    expected = np.log(np.exp(scores - largest).sum(axis=1)) + largest[:, 0]
    np.testing.assert_allclose(log_sum, expected, atol=2e-3)
    np.testing.assert_array_equal(index.search(queries, 10).ids, found.ids)
    assert index.log_sum == "int8" and index.settings["dtype"] == "int8"


def test_rounding_is_at_most_half_a_scale():
    vectors, _ = make(True, 1)
    found = int8.quantised(vectors, Prefix(E, E))
    again = np.asarray(int8.as_float(found, vectors.shape[1]))
    exact = np.asarray(vectors)
    steps = np.repeat(found.scales, E, axis=1)
    difference = np.abs(again - exact)
    assert (difference[:, : 2 * E] <= 0.5001 * steps).all()
    np.testing.assert_array_equal(again[:, 2 * E :], exact[:, 2 * E :])  # The bias.
    np.testing.assert_array_equal(np.abs(found.values).max(axis=2), 127)
    assert not int8.quantised(np.zeros((3, E)), Prefix(E, E)).values.any()
    with np.errstate(all="raise", under="ignore"):  # Numbers too small to be divided by 127.
        tiny = int8.quantised(np.full((3, E), 1e-44, np.float32), Prefix(E, E))
    assert (tiny.scales > 0).all() and not tiny.values.any()


@pytest.mark.parametrize("mesh", [None, "eight"])
def test_a_quarter_of_the_bytes_is_held(mesh):
    vectors, _ = make(False, 2)
    mesh = mesh and sharding.create_mesh(2, 4, 1)
    held = []
    for rows in (vectors, int8.quantised(vectors, Prefix(E, E))):
        index = ExactIndex(rows, mesh=mesh)
        arrays = index._rows._blocks if mesh is None else index._rows._vectors
        held.append(sum(x.nbytes for x in jax.tree.leaves(arrays)))
    assert held[1] <= held[0] * (E + 4) / (4 * E)


def test_few_labels_and_ties():
    """All labels are scored again where there are few; equal ones are found by their ids."""
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(7, E))).astype(np.float32)[[0, 1, 2, 0, 4, 5, 1]]
    index = factory.open_index(vectors, kind="exact", dtype="int8", k=9)
    found = index.search(vectors[:2], 9)
    assert list(found.ids[0][:2]) == [0, 3] and list(found.ids[1][:2]) == [1, 6]
    assert list(found.ids[0][7:]) == [-1, -1] and found.scores[0, 8] == -np.inf
    np.testing.assert_array_equal(np.sort(found.ids[1][:7]), np.arange(7))
