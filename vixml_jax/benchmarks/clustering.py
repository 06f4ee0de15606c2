"""Time and quality of balanced clustering, compared with a plain implementation.

    python -m vixml_jax.benchmarks.clustering [--n=100000 --width=384 --leaf=16,1024 --rounds=3]

Ours and the plain reference take turns in one run on the same vectors: topics of all sizes within
subjects under isotropic noise, or isotropic noise alone (--noise). The reference runs with the
default number of BLAS threads and with one, because on a busy machine BLAS threads wait for each
other, which would make the reference look slower than it is.
"""

import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import threadpoolctl
from absl import flags
from jaxtyping import Float, Int

from vixml_jax import command_line
from vixml_jax.structs import Shard
from vixml_jax.training.clustering.balanced import balanced_clusters


def _ours(x: np.ndarray, num_clusters: int, *, seed: int) -> np.ndarray:
    return balanced_clusters(Shard(np.arange(len(x)), x), len(x), num_clusters, seed=seed)


def synthetic_embeddings(n: int, width: int, *, seed: int) -> Float[np.ndarray, "n d"]:
    """Unit vectors like those of a tower: topics within subjects, and as much isotropic noise.

    Sizes of topics follow Zipf's law, all vectors share a direction, and vectors of one topic have
    a mean similarity of about 0.5.
    """
    rng = np.random.default_rng((seed, 0))
    num_topics = max(2, n // 20)
    subjects = _directions(rng, max(2, num_topics // 50), width)
    topics = subjects[rng.integers(len(subjects), size=num_topics)]
    topics += _directions(rng, num_topics, width)
    topics += _directions(rng, 1, width) * 0.5
    frequency = 1.0 / np.arange(10, num_topics + 10)
    x = topics[rng.choice(num_topics, size=n, p=frequency / frequency.sum())]
    x += 1.5 * _directions(rng, n, width)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _directions(rng: np.random.Generator, n: int, width: int) -> Float[np.ndarray, "n d"]:
    """Random vectors of length near one."""
    return rng.normal(size=(n, width)).astype(np.float32) / np.float32(np.sqrt(width))


def plain_clusters(
    x: Float[np.ndarray, "n d"], num_clusters: int, *, seed: int
) -> Int[np.ndarray, " n"]:
    """Balanced spherical 2-means as published: one group after another, each to convergence.

    Written from the paper (arXiv 2511.13189, section 3), which halves groups; here a group of k
    clusters is split ceil(k/2) : floor(k/2), so that it makes as many clusters as ours.
    """
    rng = np.random.default_rng(seed)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    clusters = np.empty(len(x), np.int32)
    groups, done = [(np.arange(len(x)), num_clusters)], 0
    while groups:
        ids, count = groups.pop()
        if count == 1:
            clusters[ids] = done
            done += 1
        else:
            half = (count + 1) // 2
            order, cut = _plain_split(x[ids], half / count, rng)
            groups += [(ids[order[:cut]], half), (ids[order[cut:]], count - half)]
    return clusters


def _plain_split(
    rows: Float[np.ndarray, "m d"], fraction: float, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " m"], int]:
    """An order of the rows, and the number of rows of the first part."""
    cut = int(np.ceil(len(rows) * fraction))
    centres = rows[rng.choice(len(rows), 2, replace=False)]
    before = -np.inf
    while True:
        scores = rows @ centres.T
        order = np.argsort(scores[:, 1] - scores[:, 0])
        first, second = order[:cut], order[cut:]
        mean = (scores[first, 0].sum() + scores[second, 1].sum()) / len(rows)
        if mean - before < 1e-4:
            return order, cut
        before = mean
        centres = np.stack([rows[first].mean(axis=0), rows[second].mean(axis=0)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)


def mean_similarity(x: Float[np.ndarray, "n d"], clusters: Int[np.ndarray, " n"]) -> float:
    """Mean cosine of a row with the centre of its cluster."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    rows = x[order] / np.maximum(np.linalg.norm(x[order], axis=1, keepdims=True), 1e-12)
    # The similarities to the normalised sum of a cluster's rows add up to the length of that sum.
    return float(np.linalg.norm(np.add.reduceat(rows, starts), axis=1).sum() / len(x))


class Measurement(NamedTuple):
    """Times of the rounds of one program, and its mean similarity."""

    seconds: list[float]
    processor_seconds: list[float]
    similarity: float


def measure(
    x: Float[np.ndarray, "n d"], num_clusters: int, *, rounds: int
) -> dict[str, Measurement]:
    """Runs each program on the same vectors, in turns; similarities are means over the rounds."""
    programs: dict[str, tuple[Callable, contextlib.AbstractContextManager]] = {
        "ours": (_ours, contextlib.nullcontext),
        "plain": (plain_clusters, contextlib.nullcontext),
        "plain, one thread": (plain_clusters, lambda: threadpoolctl.threadpool_limits(1)),
    }
    seconds, processor, similarity = ({name: [] for name in programs} for _ in range(3))
    for seed in range(rounds):
        for name, (cluster, context) in programs.items():
            with context():
                start, start_processor = time.perf_counter(), _processor_seconds()
                clusters = cluster(x, num_clusters, seed=seed)
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(_processor_seconds() - start_processor)
            similarity[name].append(mean_similarity(x, clusters))
    return {
        name: Measurement(seconds[name], processor[name], statistics.mean(similarity[name]))
        for name in programs
    }


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def table(measured: dict[str, Measurement]) -> str:
    """One line per program: median and range of seconds, processor time, mean similarity."""
    lines = [f"  {'':18} {'seconds':>8} {'(range)':>15} {'user+sys':>9} {'similarity':>11} {'':>8}"]
    plain = measured["plain"].similarity
    for name, (seconds, processor, similarity) in measured.items():
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        lines.append(
            f"  {name:18} {statistics.median(seconds):8.2f} {spread:>15} "
            f"{statistics.median(processor):9.2f} {similarity:11.4f} {similarity / plain:7.2%}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints one table for each cluster size."""
    del argv
    values = flags.FLAGS
    if values.noise:
        rng = np.random.default_rng((0, 1))
        x = rng.normal(size=(values.n, values.width)).astype(np.float32)
    else:
        x = synthetic_embeddings(values.n, values.width, seed=0)
    for leaf in values.leaf:
        num_clusters = max(1, -(-values.n // int(leaf)))
        print(f"{values.n} x {values.width} into {num_clusters} clusters of {leaf}")
        print(table(measure(x, num_clusters, rounds=values.rounds)), flush=True)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_integer("n", 100_000, "Number of vectors.", lower_bound=2)
    flags.DEFINE_integer("width", 384, "Width of the vectors.", lower_bound=1)
    flags.DEFINE_list("leaf", ["16", "1024"], "Cluster sizes, separated by commas.")
    flags.DEFINE_integer("rounds", 3, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_boolean("noise", False, "Use isotropic vectors without clusters.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
