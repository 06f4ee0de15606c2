"""Exact search on a device against numpy on the host."""

import time
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.benchmarks.accelerator.results import Row, at_most, is_true

KS = (10, 100)
SIZES = {
    "full": {"labels": 1_300_000, "width": 384, "queries": 4096, "checked": 256},
    "tiny": {"labels": 5000, "width": 16, "queries": 64, "checked": 64},
}


def check(settings: dict[str, Any]) -> list[Row]:
    """Differences between the scores that are found and the best ones, and queries per second."""
    import jax

    from vixml_jax.benchmarks.baselines import search_indexes
    from vixml_jax.parallel import sharding
    from vixml_jax.search.exact import ExactIndex

    sizes = SIZES[settings["size"]]
    labels, queries = search_indexes.labels_and_queries(
        sizes["labels"], sizes["width"], sizes["queries"]
    )
    few = queries[: sizes["checked"]]
    start = time.perf_counter()
    best = best_scores(labels, few, max(KS))
    host_s = time.perf_counter() - start
    meshes = {"one device": None}
    if jax.device_count() > 1:
        meshes[f"{jax.device_count()} devices"] = sharding.create_mesh()
    rows = []
    for where, mesh in meshes.items():
        index = ExactIndex(labels, mesh=mesh)
        for k in KS:
            ids = index.search(few, k).ids
            name = f"{where}, k {k}"
            rows.append(is_true(f"{name}: all ids differ", _differ(ids, len(labels))))
            scores = exact_scores(labels, few, ids)
            rows.append(at_most(f"{name}: score lost", np.abs(best[:, :k] - scores).max(), 1e-6))
            index.search(queries, k)  # Compiles.
            start = time.perf_counter()
            index.search(queries, k)
            speed = len(queries) / (time.perf_counter() - start)
            rows.append(Row(f"{name}: queries/s among {len(labels):,} labels", speed))
        del index
    return [*rows, Row("numpy: queries/s", len(few) / host_s)]


def best_scores(
    labels: Float[np.ndarray, "n e"], queries: Float[np.ndarray, "q e"], k: int
) -> Float[np.ndarray, "q k"]:
    """The k largest inner products of each query, largest first, in float64.

    Candidates are chosen in float32, twice as many as are needed.
    """
    best = []
    for query in np.array_split(queries, -(-len(queries) // 32)):
        scores = query @ labels.T
        count = min(2 * k, len(labels))
        ids = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        best.append(-np.sort(-exact_scores(labels, query, ids), axis=1)[:, :k])
    return np.concatenate(best)


def exact_scores(
    labels: Float[np.ndarray, "n e"],
    queries: Float[np.ndarray, "q e"],
    ids: Int[np.ndarray, "q k"],
) -> Float[np.ndarray, "q k"]:
    """Inner products of each query and the labels with these ids, in float64."""
    return np.einsum("qe,qke->qk", queries.astype(np.float64), labels[ids].astype(np.float64))


def _differ(ids: Int[np.ndarray, "q k"], num_labels: int) -> bool:
    """Whether each row has distinct ids of labels."""
    ordered = np.sort(ids, axis=1)
    inside = ordered.min() >= 0 and ordered.max() < num_labels
    return bool(inside and (np.diff(ordered, axis=1) > 0).all())
