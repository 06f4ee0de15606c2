"""Time and memory of the ranking metrics, compared with two plain implementations.

    python -m vixml_jax.benchmarks.metrics [--queries=300000 --k=100 --labels=131073 --rounds=3]

All evaluate the same random results in turns, each in a process of its own on one core: ours;
sparse indexing of the whole relevance at once, as pyxclib does
(https://github.com/kunaldahiya/pyxclib); and loops over queries in Python, whose time is scaled up
from a part of the queries. Memory is the peak allocation of a computation beside its inputs.
All three must give the same values.

    python -m vixml_jax.benchmarks.metrics --page --queries=970237 --labels=1305265

Instead, everything that `evaluate` computes after the search, at the size of LF-AmazonTitles-1.3M:
sliced metrics, confidence intervals, and the file of per-query values; seconds of each, and peak
memory of the process, with memory-mapped search results.
"""

import concurrent.futures
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import command_line, errors
from vixml_jax.benchmarks.support import workers
from vixml_jax.evaluation import bootstrap, metrics, per_query, sliced_metrics, slices

KS, RECALL_KS = (1, 3, 5), (10, 100)
_BLOCK = 16384  # Queries drawn at a time.


class Case(NamedTuple):
    """Search results and their relevance.

    Attributes:
      ids: Labels found.
      relevance: [queries, labels], ones.
      weights: Inverse propensities.
    """

    ids: Int[np.ndarray, "q k"]
    relevance: sparse.csr_matrix
    weights: Float[np.ndarray, " l"]

    def first(self, count: int) -> "Case":
        """The first `count` queries."""
        return Case(self.ids[:count], self.relevance[:count], self.weights)


def random_case(num_queries: int, k: int, num_labels: int, *, seed: int) -> Case:
    """Results without repetition, and about 2.3 true labels per query, half of them retrieved."""
    rng = np.random.default_rng(seed)
    ids = np.empty((num_queries, k), np.int32)
    true = []
    for start in range(0, num_queries, _BLOCK):
        block = ids[start : start + _BLOCK]
        # Equal steps of random width visit no label twice within a row.
        step = rng.integers(1, num_labels // k + 1, size=(len(block), 1))
        block[:] = (
            rng.integers(num_labels, size=(len(block), 1)) + step * np.arange(k)
        ) % num_labels
        owner = np.repeat(np.arange(len(block)), rng.geometric(1 / 2.3, size=len(block)))
        retrieved = block[owner, rng.integers(k, size=len(owner))]
        other = rng.integers(num_labels, size=len(owner))
        label = np.where(rng.random(len(owner)) < 0.5, retrieved, other)
        true.append(np.unique((owner + start) * num_labels + label))
    rows, columns = np.divmod(np.concatenate(true), num_labels)
    relevance = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, columns)), shape=(num_queries, num_labels)
    )
    return Case(ids, relevance, 1.0 + 10.0 * rng.random(num_labels))


def ours(case: Case) -> dict[str, float]:
    """The metrics of `compute_metrics`."""
    recall_ks = [r for r in RECALL_KS if r <= case.ids.shape[1]]
    return metrics.compute_metrics(*case, ks=KS, recall_ks=recall_ks)


def sparse_indexing(case: Case) -> dict[str, float]:
    """Hits of all queries at once, by indexing the sparse relevance with every retrieved pair."""
    ids, relevance, weights = case
    num_queries, k = ids.shape
    rows = np.repeat(np.arange(num_queries)[:, None], k, axis=1)
    hits = np.asarray(relevance[rows.ravel(), ids.ravel()]).reshape(num_queries, k) > 0
    count = np.diff(relevance.indptr)
    best = np.zeros((num_queries, max(KS)))
    owner, gain = relevance.nonzero()[0], weights[relevance.indices]
    gain = gain[np.lexsort((-gain, owner))]
    rank = np.arange(len(owner)) - np.repeat(relevance.indptr[:-1], count)
    best[owner[rank < max(KS)], rank[rank < max(KS)]] = gain[rank < max(KS)]
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discount)
    found = {}
    for n in KS:
        divisor = ideal[np.clip(count, 1, n) - 1]
        gains = hits[:, :n] * weights[ids[:, :n]]
        found[f"P@{n}"] = np.mean(np.sum(hits[:, :n], axis=1) / n)
        found[f"nDCG@{n}"] = np.mean(hits[:, :n] @ discount[:n] / divisor)
        found[f"PSP@{n}"] = np.sum(gains) / np.sum(best[:, :n])
        reached, possible = (np.mean(x[:, :n] @ discount[:n] / divisor) for x in (gains, best))
        found[f"PSnDCG@{n}"] = reached / possible
        precisions = np.cumsum(hits[:, :n], axis=1) / np.arange(1, n + 1) * hits[:, :n]
        found[f"MAP@{n}"] = np.mean(precisions.sum(axis=1) / np.clip(count, 1, n))
    for n in RECALL_KS:
        if n <= k:
            found[f"R@{n}"] = np.mean(hits[:, :n].sum(axis=1) / np.maximum(count, 1))
    covered = np.full(relevance.shape[1], k)
    np.minimum.at(covered, ids[hits], np.nonzero(hits)[1])
    occurring = np.unique(relevance.indices)
    for n in (*KS, *RECALL_KS):
        if n <= k:
            found[f"coverage@{n}"] = np.mean(covered[occurring] < n)
    first = np.argmax(hits, axis=1)
    found["MRR"] = np.mean(np.where(hits.any(axis=1), 1 / (first + 1), 0.0))
    return {name: 100.0 * float(value) for name, value in found.items()}


def loops(case: Case) -> dict[str, float]:
    """One query after another, with Python sets."""
    sums: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        sums[name] = sums.get(name, 0.0) + value

    indptr, indices = case.relevance.indptr, case.relevance.indices
    discount = [1 / math.log2(rank + 1) for rank in range(1, max(KS) + 1)]
    covered: dict[int, set[int]] = {n: set() for n in (*KS, *RECALL_KS)}
    for i, ids in enumerate(case.ids.tolist()):
        true = set(indices[indptr[i] : indptr[i + 1]].tolist())
        hits = [label in true for label in ids]
        best = sorted((case.weights[label] for label in true), reverse=True)
        for n in KS:
            possible = min(n, len(true))
            ideal = sum(discount[:possible]) or 1.0
            gains = [case.weights[label] if label in true else 0.0 for label in ids[:n]]
            add(f"P@{n}", sum(hits[:n]) / n)
            add(f"nDCG@{n}", sum(h * d for h, d in zip(hits[:n], discount, strict=False)) / ideal)
            for name, values in (("", gains), (" of", best[:n])):
                add(f"PSP@{n}{name}", sum(values))
                dcg = sum(g * d for g, d in zip(values, discount, strict=False))
                add(f"PSnDCG@{n}{name}", dcg / ideal)
            precision = sum(sum(hits[: j + 1]) / (j + 1) for j in range(n) if hits[j])
            add(f"MAP@{n}", precision / max(1, possible))
        for n in RECALL_KS:
            if n <= len(ids):
                add(f"R@{n}", sum(hits[:n]) / max(1, len(true)))
        add("MRR", 1 / (hits.index(True) + 1) if any(hits) else 0.0)
        for n, labels in covered.items():
            labels.update(label for label, hit in zip(ids[:n], hits, strict=False) if hit)
    occurring = len(set(indices.tolist()))
    for n, labels in covered.items():
        if n <= case.ids.shape[1]:
            sums[f"coverage@{n}"] = len(labels)
            sums[f"coverage@{n} of"] = occurring
    means = {n: v / sums.get(f"{n} of", len(case.ids)) for n, v in sums.items()}
    return {name: 100.0 * value for name, value in means.items() if not name.endswith(" of")}


PROGRAMS = {"ours": ours, "sparse indexing": sparse_indexing, "loops": loops}


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """Each program with a case of its own."""
    return {program: _prepare(program, settings) for program in programs}


def _prepare(program: str, settings: dict[str, Any]) -> workers.Prepared:
    """Draws the case and measures the memory of one computation; a round is another one."""
    case = random_case(settings["queries"], settings["k"], settings["labels"], seed=0)
    about: dict[str, Any] = {"scale": 1.0}
    if program == "loops":
        part = case.first(settings["part"])
        about = {"scale": len(case.ids) / len(part.ids), "ours": ours(part)}
        case = part
    tracemalloc.start()
    PROGRAMS[program](case)
    about["memory_mib"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()

    def run() -> dict[str, Any]:
        start = time.process_time()
        found = PROGRAMS[program](case)
        return {"processor_seconds": time.process_time() - start, "metrics": found}

    return about, run


def measure(settings: dict[str, Any], *, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each program reports of each round, in turns.

    Raises:
      RuntimeError: If two programs disagree.
    """
    started = {
        name: workers.Worker("vixml_jax.benchmarks.metrics", [name], settings, 1)
        for name in PROGRAMS
    }
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    try:
        for _ in range(rounds):
            for name, worker in started.items():
                about = worker.about[name]
                report = worker.time(name) | {"memory_mib": about["memory_mib"]}
                for key in ("seconds", "processor_seconds"):
                    report[key] *= about["scale"]
                reports[name].append(report)
                expected = about.get("ours", reports["ours"][0]["metrics"])
                for metric, value in expected.items():
                    if not math.isclose(report["metrics"][metric], value, abs_tol=1e-6):
                        raise RuntimeError(
                            f"{metric}: {name} say {report['metrics'][metric]}, ours {value}"
                        )
    finally:
        for worker in started.values():
            worker.close()
    return reports


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """The programs, one a line: medians of seconds, memory beside what is evaluated, ratios."""
    lines = [f"{'':16} {'seconds':>9} {'user+sys':>9} {'of ours':>9} {'peak MiB':>9}"]
    for name, rounds in reports.items():
        seconds, processor, ours_processor = (
            statistics.median(report[key] for report in reports[program])
            for program, key in (
                (name, "seconds"), (name, "processor_seconds"), ("ours", "processor_seconds"),
            )
        )  # fmt: skip
        lines.append(
            f"{name:16} {seconds:9.2f} {processor:9.2f} {processor / ours_processor:8.1f}x "
            f"{rounds[0]['memory_mib']:9.0f}"
        )
    return "\n".join(lines)


def evaluate_page(directory: str, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part of `evaluate` after the search, and peak memory in GiB."""
    rng = np.random.default_rng(1)
    num_queries, num_labels = settings["queries"], settings["labels"]
    indptr, indices, weights = (
        np.load(os.path.join(directory, f"{part}.npy")) for part in ("indptr", "indices", "weights")
    )
    ids = np.load(os.path.join(directory, "ids.npy"), mmap_mode="r")
    ones = np.ones(len(indices), np.float32)
    relevance = sparse.csr_matrix((ones, indices, indptr), shape=(num_queries, num_labels))
    frequency = rng.zipf(1.6, num_labels).clip(max=10**4) - 1
    lengths = rng.poisson(20, num_queries).astype(np.int32)
    has_none = (rng.random(num_queries) < 0.4).astype(np.int8)
    seconds, clock = {}, time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        seconds[part], clock = time.perf_counter() - clock, time.perf_counter()

    pairs = np.bincount(relevance.indices, minlength=num_labels)
    found = sliced_metrics.compute(
        ids,
        relevance,
        weights,
        label_groups={
            "frequency": slices.by_frequency(frequency),
            "decile": slices.by_decile(frequency, pairs),
        },
        query_groups={
            "images": slices.Groups(("with images", "without"), has_none),
            "length": slices.by_length(lengths),
        },
        ks=KS,
        recall_ks=[r for r in RECALL_KS if r <= settings["k"]],
    )
    lap("sliced metrics")
    bootstrap.intervals(found.queries)
    lap(f"intervals, {bootstrap.RESAMPLES} resamples")
    about = per_query.About("random", "", "test", "exact")
    per_query.save(os.path.join(directory, "test-exact.queries.npz"), found.queries, about)
    lap("per-query values")
    return seconds | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def draw_page(directory: str, settings: dict[str, Any]) -> None:
    """Writes the case to a directory."""
    case = random_case(settings["queries"], settings["k"], settings["labels"], seed=0)
    np.save(os.path.join(directory, "ids.npy"), case.ids)
    np.save(os.path.join(directory, "weights.npy"), case.weights)
    for part in ("indptr", "indices"):
        np.save(os.path.join(directory, f"{part}.npy"), getattr(case.relevance, part))


def show_page(settings: dict[str, Any]) -> None:
    """Draws in one process and evaluates in another, so that memory is of evaluation only."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        for do in (draw_page, evaluate_page):
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(do, directory, settings).result()
        size = os.path.getsize(os.path.join(directory, "test-exact.queries.npz")) / 2**20
    peak = found.pop("peak")
    for part, seconds in found.items():
        print(f"{part:28} {seconds:7.1f} s")
    load = os.getloadavg()[0]
    print(f"{'total':28} {sum(found.values()):7.1f} s, peak {peak:.2f} GiB, file {size:.1f} MiB")
    print(f"{os.cpu_count()} cores, load {load:.1f}")


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    values = flags.FLAGS
    settings = {name: values[name].value for name in ("queries", "k", "labels", "part")}
    if values.k > values.labels or values.k < max(KS):
        raise errors.InputError(
            f"--k={values.k}: expected {max(KS)} to {values.labels}, the number of labels"
        )
    size = f"{values.queries} queries x {values.k} results, {values.labels} labels"
    if values.page:
        print(size)
        show_page(settings)
        return
    print(f"{size}, one core")
    reports = measure(settings, rounds=values.rounds)
    print(table(reports))
    print(
        f"all values agree; median of {values.rounds} rounds; loops: scaled up from {values.part} "
        "queries"
    )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_integer("queries", 300_000, "Number of queries.", lower_bound=1)
    flags.DEFINE_integer("k", 100, "Results per query.", lower_bound=1)
    flags.DEFINE_integer("labels", 131_073, "Number of labels.", lower_bound=1)
    flags.DEFINE_boolean(
        "page", False, "Measure everything that evaluate computes, not only the metrics."
    )
    flags.DEFINE_integer(
        "part", 5000, "Queries that the loops evaluate; their time is scaled up.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", 3, "Rounds of each program.", lower_bound=1)


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
