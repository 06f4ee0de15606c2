"""Exact search against sorting all scores, for any mesh and any block sizes."""

import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from vixml_jax.parallel import sharding
from vixml_jax.search import exact
from vixml_jax.search.exact import ExactIndex


def integers_only(rng, *shape):
    """Vectors of small integers: sums are exact in float32, and there are many ties."""
    return rng.integers(-2, 3, size=shape).astype(np.float32)


def expected_top_k(vectors, queries, k):
    """The k best by a stable sort, so that ties go to the lower id; padded if k is too large."""
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - ids.shape[1]))
    best = np.take_along_axis(scores, ids, axis=1)
    return (
        np.pad(best, missing, constant_values=-np.inf),
        np.pad(ids, missing, constant_values=-1),
    )


def assert_matches(result, vectors, queries, k):
    scores, ids = expected_top_k(vectors, queries, k)
    assert isinstance(result.ids, np.ndarray) and result.ids.dtype == np.int32
    assert isinstance(result.scores, np.ndarray) and result.scores.dtype == np.float32
    np.testing.assert_array_equal(result.ids, ids)
    np.testing.assert_array_equal(result.scores, scores)


@pytest.mark.parametrize("query_block,label_block", [(4, 7), (1024, 4096), (3, 1), (5, 256)])
@pytest.mark.parametrize("num_labels", [61, 1000])
@pytest.mark.parametrize("k", [1, 10, 70])
def test_search_matches_sort(query_block, label_block, num_labels, k):
    rng = np.random.default_rng((0, k))
    vectors, queries = integers_only(rng, num_labels, 5), integers_only(rng, 13, 5)
    index = ExactIndex(vectors, query_block=query_block, label_block=label_block)
    assert_matches(index.search(queries, k), vectors, queries, k)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (4, 2, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("num_labels,k", [(61, 5), (9, 9), (3, 20), (200, 40)])
def test_mesh_matches_sort(sizes, num_labels, k):
    rng = np.random.default_rng((1, num_labels))
    vectors, queries = integers_only(rng, num_labels, 6), integers_only(rng, 7, 6)
    mesh = sharding.create_mesh(*sizes)
    index = ExactIndex(vectors, mesh=mesh, query_block=4, label_block=8)
    assert_matches(index.search(queries, k), vectors, queries, k)


def test_mesh_of_all_devices_and_one_device_agree_on_any_vectors():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(999, 24)).astype(np.float32)
    queries = rng.normal(size=(33, 24)).astype(np.float32)
    devices = np.array(jax.devices())
    one = jax.sharding.Mesh(
        devices[:1].reshape(1, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3
    )
    results = [
        ExactIndex(vectors, mesh=mesh, label_block=100).search(queries, 20)
        for mesh in (None, one, sharding.create_mesh())
    ]
    scores, ids = expected_top_k(vectors, queries, 20)
    for result in results:
        np.testing.assert_array_equal(result.ids, ids)
        np.testing.assert_allclose(result.scores, scores, rtol=0, atol=2e-5)


def test_rows_are_sharded_over_all_devices():
    vectors = np.ones((61, 4), np.float32)
    index = ExactIndex(vectors, mesh=sharding.create_mesh(2, 4, 1))
    shards = index._rows._vectors.addressable_shards
    assert len({shard.device for shard in shards}) == 8
    assert {shard.data.shape for shard in shards} == {(8, 4)}


@pytest.mark.parametrize("where", ["host", "mesh"])
def test_compiles_once_for_all_blocks_and_indexes(where):
    rng = np.random.default_rng(3)
    program = exact._score if where == "host" else exact._top_k
    program.clear_cache()
    mesh = None if where == "host" else sharding.create_mesh()
    for _ in range(2):
        vectors = integers_only(rng, 512, 4)
        index = ExactIndex(vectors, query_block=8, label_block=16, mesh=mesh)
        for count in (5, 8, 20, 41):
            index.search(integers_only(rng, count, 4), 3)
    assert program._cache_size() == 1


def test_a_mesh_holds_one_block_of_scores():
    """The temporary memory of the compiled search fits one block of scores, not [q, n]."""
    mesh = sharding.create_mesh(1, 1, 1, devices=jax.devices()[:1])
    queries, vectors = np.ones((64, 4), np.float32), np.ones((4096, 4), np.float32)
    lowered = exact._top_k.lower(vectors, queries, k=10, num_labels=4096, num_blocks=16, mesh=mesh)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 64 * 4096 * 4 / 2


@pytest.mark.parametrize("draws", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_groups_find_what_top_k_finds(draws):
    """On scores with many ties and masked columns, for any number of columns."""
    rng = np.random.default_rng()
    for _ in range(draws):  # Each compiles two programs.
        columns = int(rng.integers(1, 5000))
        k = min(columns, int(rng.integers(1, rng.choice([20, 150, 5000]))))
        scores = rng.integers(0, rng.integers(1, 50), (3, columns)).astype(np.float32)
        scores[:, rng.random(columns) < rng.random()] = -np.inf
        best, at = exact._top_k_by_groups(jnp.asarray(scores), k)
        expected, expected_at = jax.lax.top_k(scores, k)
        np.testing.assert_array_equal(best, expected)
        is_real = np.isfinite(expected)
        np.testing.assert_array_equal(np.where(is_real, at, 0), np.where(is_real, expected_at, 0))
        assert (np.asarray(at) < columns).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_whole_block_is_sorted_on_accelerators(platform):
    shapes = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((131_072, 8), (16, 8)))
    settings = {"k": 100, "num_labels": 131_072, "num_blocks": 2, "mesh": None}
    lowered = exact._top_k.trace(*shapes, **settings).lower(lowering_platforms=(platform,))
    sorted_widths = re.findall(r"(?:top_k|sort)\(.*?tensor<16x(\d+)x[fi]32>", lowered.as_text())
    assert sorted_widths and max(map(int, sorted_widths)) <= 3200


@pytest.mark.parametrize("equal", [False, True])
def test_the_host_holds_one_block_of_scores(equal, monkeypatch):
    """Also if all scores are equal, as of a collapsed tower, so that all rows are candidates."""
    rng = np.random.default_rng(5)
    shapes = []
    score = exact._score

    def spy(*args, **kwargs):
        found = score(*args, **kwargs)
        shapes.append(found[0].shape)
        return found

    monkeypatch.setattr(exact, "_score", spy)
    vectors = np.ones((40_000, 4), np.float32) if equal else rng.normal(size=(40_000, 4))
    index = ExactIndex(vectors, query_block=64, label_block=8192)
    queries = rng.normal(size=(128, 4)).astype(np.float32)
    index.search(queries[:1], 10)  # Compiles.
    tracemalloc.start()
    result = index.search(queries, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(shapes) == (64, 8192)
    assert peak < 64 * 8192 * 4  # Memory of numpy, in addition to the scores.
    if equal:
        np.testing.assert_array_equal(result.ids, np.tile(np.arange(10), (128, 1)))


@pytest.mark.parametrize("order", ["ascending", "descending", "random", "one group"])
@pytest.mark.parametrize("k", [1, 7, 100, 2000])
def test_any_order_of_scores(order, k):
    """Labels in any order of their scores, in several blocks; e.g. each new label is the best."""
    rng = np.random.default_rng((6, k))
    values = np.sort(rng.normal(size=5000)).astype(np.float32)
    values = {
        "ascending": values,
        "descending": values[::-1],
        "random": rng.permutation(values),
        "one group": np.where(np.arange(5000) // 32 == 40, values, -np.abs(values)),
    }[order]
    vectors, queries = values[:, None], np.array([[1.0], [-2.0], [0.0]], np.float32)
    for label_block in (512, 8192):
        result = ExactIndex(vectors, label_block=label_block).search(queries, k)
        assert_matches(result, vectors, queries, k)


@pytest.mark.parametrize("num_queries,num_labels", [(0, 9), (3, 0)])
def test_no_queries_or_no_labels(num_queries, num_labels):
    index = ExactIndex(np.zeros((num_labels, 4), np.float32))
    result = index.search(np.zeros((num_queries, 4), np.float32), 2)
    np.testing.assert_array_equal(result.ids, np.full((num_queries, 2), -1))
    np.testing.assert_array_equal(result.scores, np.full((num_queries, 2), -np.inf))


def test_other_dtypes_are_searched_in_float32():
    rng = np.random.default_rng(4)
    vectors, queries = integers_only(rng, 20, 4), integers_only(rng, 3, 4)
    index = ExactIndex(vectors.astype(np.float16))
    assert_matches(index.search(queries.astype(np.float64), 4), vectors, queries, 4)
