"""Time and memory of clusters and centroids when the embeddings are sharded over processes.

    python -m vixml_jax.benchmarks.sharded_clustering [--processes=1,2,4 --n=400000 --width=768]

The processes share the cores of this machine, so processor time is reported, for the process that
needs most. Divided work falls with the number of processes P; work that every process does for all
rows does not. W / P + S is fitted to the times of several processes (a single one communicates
nothing) and extrapolated to other sizes: W grows with rows, width and the depth of the tree, S with
rows and the depth that is bisected by all processes together.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Float
from scipy import optimize, sparse

from vixml_jax import command_line
from vixml_jax.benchmarks.support import workers
from vixml_jax.labels.centroids import exact_centroids
from vixml_jax.parallel import distributed
from vixml_jax.runtime import host_memory
from vixml_jax.structs import Shard
from vixml_jax.training.clustering.balanced import MAX_LOCAL_ROWS, balanced_clusters

_BLOCK = 4096  # Rows made at a time from one seed, so that each process makes its own.


def embeddings(start: int, stop: int, *, num: int, width: int) -> Float[np.ndarray, "m d"]:
    """Rows from start to stop, multiples of 4096, of unit vectors in topics within subjects."""
    rng = np.random.default_rng(0)
    num_topics, num_subjects = max(2, num // 20), max(2, num // 1000)
    subjects = rng.standard_normal((num_subjects, width), np.float32)
    topics = rng.standard_normal((num_topics, width), np.float32)
    topics += subjects[rng.integers(num_subjects, size=num_topics)]
    x = np.empty((stop - start, width), np.float32)
    for first in range(start, stop, _BLOCK):
        rng = np.random.default_rng((1, first))
        block = x[first - start : first - start + _BLOCK]
        block[:] = topics[rng.integers(num_topics, size=len(block))]
        block += np.float32(1.5) * rng.standard_normal(block.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return x


def _relevance(num: int, num_labels: int, each: int) -> sparse.csr_matrix:
    rng = np.random.default_rng(3)
    columns = rng.integers(num_labels, size=num * each, dtype=np.int32)
    ones = np.ones(num * each, np.float32)
    return sparse.csr_matrix(
        (ones, columns, np.arange(0, num * each + 1, each)), shape=(num, num_labels)
    )


def work() -> None:
    """In a child process: clusters and centroids of its shard; writes what they took."""
    values = flags.FLAGS
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    host_memory.bound_freed_pages()
    group, num = distributed.world(), values.n
    blocks = -(-num // _BLOCK)
    edges = [min(num, blocks * at // group.count * _BLOCK) for at in range(group.count + 1)]
    start, stop = edges[group.index : group.index + 2]
    shard = Shard(np.arange(start, stop), embeddings(start, stop, num=num, width=values.width))
    labels = [
        np.arange(values.labels * at // group.count, values.labels * (at + 1) // group.count)
        for at in range(group.count)
    ]
    relevance = _relevance(num, values.labels, values.per_query)
    group.gather(np.zeros(1))  # Wait for all processes.

    def timed(what: str, run: object) -> dict[str, float]:
        wall, processor = time.perf_counter(), time.process_time()
        run()
        return {
            f"{what}_s": time.process_time() - processor,
            f"{what}_wall_s": time.perf_counter() - wall,
        }

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = -(-num // values.leaf)
    report = timed(
        "clusters", lambda: balanced_clusters(shard, num, count, seed=0, group=group)
    ) | timed("centroids", lambda: exact_centroids(relevance, shard, labels, group=group))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report |= {"shard_gib": shard.values.nbytes / 2**30, "more_gib": (peak - held) / 2**20}
    with open(os.path.join(values.out, str(group.index)), "w", encoding="utf-8") as out:
        json.dump(report, out)


def measure(count: int, scratch: str) -> dict[str, float]:
    """The maximum of each measurement over `count` processes."""
    command = [sys.executable, "-m", "vixml_jax.benchmarks.sharded_clustering", *sys.argv[1:]]
    children = [
        subprocess.Popen(
            [*command, f"--out={scratch}", *process_flags],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
        )
        for process_flags in workers.cluster_flags(count)
    ]
    if any([child.wait() for child in children]):
        raise RuntimeError(f"one of {count} processes failed")
    reports = []
    for index in range(count):
        with open(os.path.join(scratch, str(index)), encoding="utf-8") as file:
            reports.append(json.load(file))
    return {name: max(report[name] for report in reports) for name in reports[0]}


def fit(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """W and S of seconds = W / count + S, by non-negative least squares."""
    rows = np.stack([1 / np.asarray(counts, float), np.ones(len(counts))], axis=1)
    return tuple(optimize.nnls(rows, np.asarray(seconds, float))[0])


def main(argv: Sequence[str]) -> None:
    """Prints one line for each number of processes, and an extrapolation to other sizes."""
    del argv
    values = flags.FLAGS
    if values.out:
        work()
        return
    counts = [int(count) for count in values.processes]
    print(
        f"{values.n} x {values.width}, clusters of {values.leaf}, {values.labels} labels, "
        f"{values.per_query} per query: processor seconds of the busiest process"
    )
    print("processes  clusters  centroids  shard GiB  other GiB")
    reports = []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            report = measure(count, scratch)
        reports.append(report)
        print(
            f"{count:9d} {report['clusters_s']:9.1f} {report['centroids_s']:10.1f} "
            f"{report['shard_gib']:10.2f} {report['more_gib']:10.2f}   (wall clock "
            f"{report['clusters_wall_s']:.1f}, {report['centroids_wall_s']:.1f})",
            flush=True,
        )
    grown, spread = values.to_n / values.n, values.to_processes * values.to_cores
    depth = math.log2(values.to_n / values.leaf) / math.log2(values.n / values.leaf)
    together = math.log2(max(2, values.to_n / MAX_LOCAL_ROWS))
    together /= math.log2(max(2, values.n / MAX_LOCAL_ROWS))
    for what, by_depth, serial_by_depth in (("clusters", depth, together), ("centroids", 1, 1)):
        several = [pair for pair in zip(counts, reports, strict=True) if pair[0] > 1]
        parallel, serial = fit(
            [count for count, _ in several], [report[f"{what}_s"] for _, report in several]
        )
        seconds = parallel * grown * by_depth / spread + serial * grown * serial_by_depth
        print(
            f"{what}: {parallel:.1f} / P + {serial:.1f} s; {values.to_n} rows on "
            f"{values.to_processes} processes of {values.to_cores} cores: {seconds:.1f} s"
        )


def define_flags() -> None:
    """The flags of this benchmark, and those of the cluster of processes."""
    distributed.define_flags()
    flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes.")
    flags.DEFINE_integer("n", 400_000, "Training queries.", lower_bound=2)
    flags.DEFINE_integer("width", 768, "Width of an embedding.", lower_bound=1)
    flags.DEFINE_integer("leaf", 16, "Queries per cluster.", lower_bound=1)
    flags.DEFINE_integer("labels", 240_000, "Number of labels.", lower_bound=1)
    flags.DEFINE_integer("per_query", 22, "Labels per query.", lower_bound=1)
    flags.DEFINE_integer("to_n", 2_250_000, "Training queries to extrapolate to.")
    flags.DEFINE_integer("to_processes", 64, "Processes to extrapolate to.")
    flags.DEFINE_integer("to_cores", 16, "Cores of each of these processes.")
    flags.DEFINE_string(
        "out", "", "Directory for reports of child processes; set by the benchmark."
    )


if __name__ == "__main__":
    command_line.launch(main, define_flags)
