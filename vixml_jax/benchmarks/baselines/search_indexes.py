"""Baselines of the search benchmark: each index is built and swept in a process of its own.

    python -m vixml_jax.benchmarks.baselines.search_indexes BASELINE JSON

is what `benchmarks.search` starts for each of them; it answers with a line of json. All search all
queries at once on all cores, and have two numbers that trade speed for recall: leaves or
candidates looked at, and how many of them are scored exactly.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.benchmarks.support.resident_memory import forget_peak, kilobytes
from vixml_jax.search import index, scann, tuning
from vixml_jax.search.exact import ExactIndex
from vixml_jax.structs import SearchResult

TARGETS, KS = (0.95, 0.99, 0.999), (5, 100)
_BLOCK = 65536  # Vectors drawn at a time.
_ROUNDS = 5  # Rounds in which settings take turns.


class Baseline(NamedTuple):
    """An index that has been built, and the settings to sweep."""

    search: Callable[[np.ndarray, int, int, int], Int[np.ndarray, "q k"]]  # queries, k, a, b.
    breadths: list[int]  # First setting: leaves or candidates visited.
    depths: Callable[[int], list[int]]  # k -> second setting: candidates scored exactly.
    about: str  # Description of how it was built.


def labels_and_queries(
    n: int, width: int, num_queries: int, *, seed: int = 0
) -> tuple[Float[np.ndarray, "n e"], Float[np.ndarray, "q e"]]:
    """Unit vectors as a trained tower makes them, and queries each near one of them.

    Labels lie around n/50 topics, which lie around n/5000 subjects, both with as much noise as
    there is direction; a query has a similarity of about 0.8 to its label. Blocks are drawn one by
    one, and the labels start at a multiple of 64 bytes, so that JAX need not copy them.
    """
    rng = np.random.default_rng(seed)
    subjects = _directions(rng, max(2, n // 5000), width)
    topics = subjects[rng.integers(len(subjects), size=max(2, n // 50))]
    topics += _directions(rng, len(topics), width)
    buffer = np.empty(n * width + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    labels = buffer[start : start + n * width].reshape(n, width)
    for first in range(0, n, _BLOCK):
        part = labels[first : first + _BLOCK]
        part[:] = topics[rng.integers(len(topics), size=len(part))]
        part += 1.4 * _directions(rng, len(part), width)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    queries = labels[rng.integers(n, size=num_queries)]
    queries += 0.75 * _directions(rng, num_queries, width)
    return labels, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def _directions(rng: np.random.Generator, n: int, width: int) -> Float[np.ndarray, "n e"]:
    """Random vectors of length near one."""
    return rng.standard_normal((n, width), np.float32) / np.float32(np.sqrt(width))


def build_scann(labels: Float[np.ndarray, "n e"]) -> Baseline:
    """ScaNN, with our settings for these vectors."""
    tree = scann.ScannIndex.build(labels)

    def search(queries: np.ndarray, k: int, a: int, b: int) -> np.ndarray:
        return tree.search_with(queries, k, leaves_searched=a, reordered=b).ids

    leaves, block = tree.settings["leaves"], tree.settings["dimensions_per_block"]
    about = f"{leaves} leaves, 4 bits for {block} dimensions"
    return Baseline(search, tuning.steps(1, leaves), _depths(len(labels)), about)


def build_scann_soar(labels: Float[np.ndarray, "n e"]) -> Baseline:
    """ScaNN with each label in two leaves (SOAR) and 4 bits for each two dimensions."""
    from scann.scann_ops.py import scann_ops_pybind

    n = len(labels)
    leaves = round(np.sqrt(n))
    builder = scann_ops_pybind.builder(labels, 1, "dot_product")
    builder.tree(
        leaves,
        leaves,
        training_sample_size=min(n, scann.SAMPLE),
        random_init=False,
        soar_lambda=1.5,
        overretrieve_factor=2.0,
    )
    tree = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(400).build()

    def search(queries: np.ndarray, k: int, a: int, b: int) -> np.ndarray:
        options = {"pre_reorder_num_neighbors": min(n, b), "leaves_to_search": a}
        return tree.search_batched_parallel(queries, final_num_neighbors=k, **options)[0]

    about = f"{leaves} leaves, 4 bits for 2 dimensions, SOAR"
    return Baseline(search, tuning.steps(1, leaves), _depths(n), about)


def build_faiss(labels: Float[np.ndarray, "n e"]) -> Baseline:
    """IVF-PQ of as many leaves, 4 bits for each two dimensions ("fast scan"), then rescored."""
    import faiss

    n, width = labels.shape
    leaves = round(np.sqrt(n))
    about = f"IVF{leaves},PQ{width // 2}x4fs,RFlat"
    built = faiss.index_factory(width, about, faiss.METRIC_INNER_PRODUCT)
    built.train(labels[np.random.default_rng(0).permutation(n)[: min(n, scann.SAMPLE)]])
    built.add(labels)

    def search(queries: np.ndarray, k: int, a: int, b: int) -> np.ndarray:
        faiss.extract_index_ivf(built).nprobe = a
        built.k_factor = b / k
        return built.search(queries, k)[1]

    return Baseline(search, tuning.steps(1, leaves), _depths(n), about)


def build_hnswlib(labels: Float[np.ndarray, "n e"]) -> Baseline:
    """A graph with 32 neighbours per label, built with 200 candidates."""
    import hnswlib

    n, width = labels.shape
    built = hnswlib.Index(space="ip", dim=width)
    built.init_index(max_elements=n, M=16, ef_construction=200, random_seed=0)
    built.set_num_threads(os.cpu_count() or 1)
    built.add_items(labels, np.arange(n))

    def search(queries: np.ndarray, k: int, a: int, b: int) -> np.ndarray:
        built.set_ef(max(a, k))
        return built.knn_query(queries, k)[0].astype(np.int64)

    return Baseline(search, tuning.steps(8, 8192), lambda k: [k], "M 16, ef_construction 200")


def _depths(n: int) -> Callable[[int], list[int]]:
    return lambda k: tuning.steps(k, min(n, max(64 * k, 4096)))


BUILD = {
    "scann": build_scann,
    "scann_soar": build_scann_soar,
    "faiss": build_faiss,
    "hnswlib": build_hnswlib,
}
MODULES = {"scann_soar": "scann"}  # Those that are not called like the baseline.


def sweep(
    baseline: Baseline, queries: Float[np.ndarray, "q e"], truth: Int[np.ndarray, "q k"], k: int
) -> list[dict[str, Any]]:
    """For each recall wanted, the fastest setting found that reaches it.

    Of those measured that suffice, the ones of which neither number can be less take turns.

    Args:
      baseline: Built.
      queries: All searched at once.
      truth: The exact best labels, k at least.
      k: Results that count.
    """
    known: dict[tuple[int, int], tuning.Measurement] = {}
    exact = SearchResult(np.zeros(truth.shape), truth)

    def measure(a: int, b: int) -> tuning.Measurement:
        if (a, b) not in known:
            start = time.perf_counter()
            ids = baseline.search(queries, k, a, b)
            speed = len(queries) / (time.perf_counter() - start)
            recall = index.recall_against(exact, SearchResult(np.zeros(ids.shape), ids), k)
            known[a, b] = tuning.Measurement(a, b, recall, speed)
        return known[a, b]

    for wanted in TARGETS:
        tuning.frontier(measure, baseline.breadths, baseline.depths(k), wanted)
    rows = []
    for wanted in TARGETS:
        enough = [one for one in known.values() if one.recall >= wanted]
        least = [one for one in enough if not any(_less(other, one) for other in enough)]
        turns = [[_speed(baseline, queries, k, one) for one in least] for _ in range(_ROUNDS)]
        row = {"k": k, "wanted": wanted, "recall": max(one.recall for one in known.values())}
        if least:
            speeds = [statistics.median(speed) for speed in zip(*turns, strict=True)]
            best = int(np.argmax(speeds))
            row |= {**least[best]._asdict(), "queries_per_s": speeds[best]}
        rows.append(row)
    return rows


def _less(one: tuning.Measurement, than: tuning.Measurement) -> bool:
    """Whether a setting is smaller in one number and not larger in the other."""
    a, b = one[:2], than[:2]
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _speed(baseline: Baseline, queries: np.ndarray, k: int, setting: tuning.Measurement) -> float:
    start = time.perf_counter()
    baseline.search(queries, k, setting.leaves_searched, setting.reordered)
    return len(queries) / (time.perf_counter() - start)


def run(name: str, *, n: int, width: int, queries: int, truth: str) -> dict[str, Any]:
    """Builds and sweeps one baseline; or, as 'exact', writes what is true, for the others.

    Args:
      name: Of `BUILD`, or 'exact'.
      n, width, queries: Of the vectors.
      truth: The file of the exact best labels.
    """
    labels, asked = labels_and_queries(n, width, queries)
    forget_peak()
    before, start = kilobytes("VmRSS"), time.perf_counter()
    if name == "exact":
        exact = ExactIndex(labels)
        exact.search(asked[:8], max(KS))  # Compiles.
        start = time.perf_counter()
        found = exact.search(asked, max(KS))
        seconds = time.perf_counter() - start
        with open(truth, "wb") as file:
            np.save(file, found.ids)
        return {"baseline": name, "queries_per_s": queries / seconds}
    baseline = BUILD[name](labels)
    built = time.perf_counter() - start
    said = {
        "baseline": name,
        "about": baseline.about,
        "build_s": built,
        "build_gib": (kilobytes("VmHWM") - before) / 2**20,
        "index_gib": (kilobytes("VmRSS") - before) / 2**20,
    }
    true = np.load(truth)
    forget_peak()
    rows = [row for k in KS for row in sweep(baseline, asked, true, k)]
    return {**said, "search_gib": (kilobytes("VmHWM") - before) / 2**20, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], **json.loads(sys.argv[2]))), flush=True)
