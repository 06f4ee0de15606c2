"""Exact search compared with bare products and PyTorch; ScaNN compared with hnswlib and faiss.

    python -m vixml_jax.benchmarks.search --what=exact [--n=131072,1300000 --width=384 --k=100]
    python -m vixml_jax.benchmarks.search --what=approximate [--n=1300000 --width=384
        --baselines=scann,scann_soar,faiss,hnswlib --out=search.json]
    python -m vixml_jax.benchmarks.search --what=latency [--n=5000,20000,131072 --width=384 --k=10
        --removed=20000]

Exact: ours, the bare matrix products of the same blocks (XLA and numpy's BLAS), and `matmul` with
`topk` of 32 queries at a time in PyTorch, as the authors do, take turns in one process on the same
vectors, on one thread (--threads).

Approximate: each index in a process of its own, on all cores, on the same clustered vectors (see
`baselines/search_indexes.py`): the highest speed that it reaches at a recall of 0.95, 0.99 and
0.999 of the exact 5 and 100 best, seconds to build it, and memory beside the vectors. --out gathers
the results of several commands.

Latency: exact search and ScaNN, tuned to a recall of 0.99, take turns on 1, 16 and 128 queries at a
time, on all cores; with --removed also with so many labels removed.

hnswlib and faiss: pip install 'vixml_jax[benchmark]'.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.baselines import search_indexes
from vixml_jax.benchmarks.support import workers
from vixml_jax.errors import InputError
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.factory import open_index
from vixml_jax.search.index import Index
from vixml_jax.search.updates import UpdatedIndex
from vixml_jax.storage import json_files

_QUERY_BLOCK, _LABEL_BLOCK = 1024, 65536  # Defaults of `ExactIndex`.


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """In a child process: the programs, all on one copy of the vectors."""
    import jax
    import jax.numpy as jnp
    import torch

    labels, queries = search_indexes.labels_and_queries(
        settings["n"], settings["width"], settings["queries"]
    )
    k = settings["k"]
    ours = ExactIndex(labels)
    # Not copied: the blocks are aligned as JAX requires.
    blocks = [labels[i : i + _LABEL_BLOCK] for i in range(0, len(labels), _LABEL_BLOCK)]
    placed = [jax.device_put(block) for block in blocks]
    product = jax.jit(lambda q, v: jnp.dot(q, v.T, precision=jax.lax.Precision.HIGHEST))
    transposed = torch.from_numpy(labels).T

    def of_blocks(multiply: Callable[[np.ndarray, Any], Any], blocks: list[Any]) -> None:
        for start in range(0, len(queries), _QUERY_BLOCK):
            for block in blocks:
                multiply(queries[start : start + _QUERY_BLOCK], block)

    def batches() -> None:
        for start in range(0, len(queries), 32):
            scores = torch.from_numpy(queries[start : start + 32]) @ transposed
            torch.topk(scores, k)

    known = {
        "ours": lambda: ours.search(queries, k),
        "product, XLA": lambda: of_blocks(lambda q, v: product(q, v).block_until_ready(), placed),
        "product, numpy": lambda: of_blocks(lambda q, v: q @ v.T, blocks),
        "torch": batches,
    }

    def timed(run: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
        return lambda: (run(), {})[1]

    about = {"queries": len(queries)}
    prepared = {name: (about, timed(known[name.partition(", ")[2]])) for name in programs}
    for _, run in prepared.values():
        run()  # Compiles, and touches all memory once.
    return prepared


def compare_exact(n: int, width: int, k: int, queries: int, *, threads: int, rounds: int) -> None:
    """Prints queries per second and ratios."""
    programs = ["exact, ours", "exact, product, XLA", "exact, product, numpy", "exact, torch"]
    workers.compare(
        "vixml_jax.benchmarks.search",
        programs,
        [(programs[1], programs[0]), (programs[0], programs[3])],
        {"n": n, "width": width, "k": k, "queries": queries, "threads": threads},
        rounds=rounds,
        texts=lambda about: about["queries"],
        unit="queries",
    )


def compare_latency(n: int, width: int, k: int, queries: int, rounds: int, removed: int) -> None:
    """Prints the median milliseconds of exact search and of ScaNN, and their ratio.

    Both are timed as they are and, if `removed` is not 0, with so many labels removed.
    """
    labels, asked = search_indexes.labels_and_queries(n, width, queries)
    exact = open_index(labels, kind="exact", k=k)
    tree = open_index(labels, kind="scann", queries=asked, k=k)
    print(f"{n:,} labels x {width}, {k} results, recall {tree.settings['recall']:.4f}; ms a call")
    chosen = np.random.default_rng(0).permutation(n)[:removed]
    pairs: dict[str, tuple[Index, Index]] = {"": (exact, tree)}
    if removed:
        pairs[f", {removed:,} removed"] = (
            UpdatedIndex(exact, None, n, chosen),
            UpdatedIndex(tree, None, n, chosen),
        )
    for count in (1, 16, 128):
        seconds: dict[Index, list[float]] = {index: [] for pair in pairs.values() for index in pair}
        for turn in range(20 * rounds + 1):
            block = np.take(asked, np.arange(turn * count, (turn + 1) * count), 0, mode="wrap")
            for index, times in seconds.items():
                start = time.perf_counter()
                index.search(block, k)
                times.append(time.perf_counter() - start)
        for name, pair in pairs.items():
            # The first call compiles.
            own, scann = (1000 * statistics.median(seconds[index][1:]) for index in pair)
            print(
                f"  {count:4d} queries{name}: exact {own:8.2f}, ScaNN {scann:8.2f}, "
                f"ratio {own / scann:6.1f}",
                flush=True,
            )


def measure_baselines(
    baseline_names: Sequence[str], n: int, width: int, queries: int, out: str
) -> list[dict[str, Any]]:
    """The reports of all baselines, together with earlier ones on the same vectors.

    Args:
      baseline_names: Names in `search_indexes.BUILD`.
      n, width, queries: Sizes of the vectors.
      out: JSON file that gathers results; replaced after each baseline.
    """
    key, gathered = f"{n} x {width}, {queries} queries", {}
    if os.path.exists(out):
        with open(out, encoding="utf-8") as file:
            gathered = json.load(file)
    found = gathered.setdefault(key, {})
    with tempfile.TemporaryDirectory() as directory:
        settings = {"n": n, "width": width, "queries": queries, "truth": f"{directory}/truth.npy"}
        for name in ("exact", *baseline_names):
            command = [sys.executable, "-m", "vixml_jax.benchmarks.baselines.search_indexes", name]
            done = subprocess.run(
                [*command, json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=True
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{key}: {name} measured", flush=True)
            json_files.write(out, gathered)
    return list(found.values())


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line per baseline: build, memory, queries per second at each recall of each k."""
    columns = [(k, wanted) for k in search_indexes.KS for wanted in search_indexes.TARGETS]
    heads = "".join(f"{f'@{k} {wanted}':>12}" for k, wanted in columns)
    lines = [f"  {'':13} {'build s':>8} {'peak GiB':>8} {'held GiB':>8}{heads}   queries/s"]
    for one in found:
        if "rows" not in one:
            lines.append(f"  {one['baseline']:13} {'':26}{one['queries_per_s']:12,.0f}")
            continue
        speeds = {(row["k"], row["wanted"]): row for row in one["rows"]}
        cells = "".join(_cell(speeds[column]) for column in columns)
        numbers = f"{one['build_s']:8.0f} {one['build_gib']:8.2f} {one['search_gib']:8.2f}"
        lines.append(f"  {one['baseline']:13} {numbers}{cells}   {one['about']}")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    """Queries per second, or the highest recall where the target is out of reach."""
    if "queries_per_s" in row:
        return f"{row['queries_per_s']:12,.0f}"
    return f"{'recall ' + format(row['recall'], '.3f'):>12}"


def check_baselines(baseline_names: Sequence[str]) -> None:
    """Raises InputError for baselines that are unknown or not installed."""
    for name in baseline_names:
        if name not in search_indexes.BUILD:
            known = ", ".join(search_indexes.BUILD)
            raise InputError(f"--baselines={name}: expected some of {known}")
        if importlib.util.find_spec(search_indexes.MODULES.get(name, name)) is None:
            raise InputError(f"--baselines={name}: not installed; pip install vixml_jax[benchmark]")


def main(argv: Sequence[str]) -> None:
    """Prints one table for each number of labels."""
    del argv
    values = flags.FLAGS
    check_baselines(values.baselines if values.what == "approximate" else [])
    for n in map(int, values.n):
        if values.what == "latency":
            compare_latency(
                n, values.width, values.k, values.queries, values.rounds, values.removed
            )
        elif values.what == "exact":
            compare_exact(
                n,
                values.width,
                values.k,
                values.queries,
                threads=values.threads,
                rounds=values.rounds,
            )
        else:
            found = measure_baselines(values.baselines, n, values.width, values.queries, values.out)
            print(f"{n:,} labels x {values.width}, {os.cpu_count()} cores; queries/s at recall")
            print(table(found), flush=True)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("what", "exact", ["exact", "approximate", "latency"], "Kind of search.")
    flags.DEFINE_list("n", ["131072"], "Numbers of labels, separated by commas.")
    flags.DEFINE_integer("width", 384, "Width of the vectors.", lower_bound=2)
    flags.DEFINE_integer("queries", 2048, "Number of queries.", lower_bound=1)
    flags.DEFINE_integer("k", 100, "Results per query, not for --what=approximate.", lower_bound=1)
    flags.DEFINE_integer("threads", 1, "Threads, for --what=exact.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer(
        "removed", 0, "Labels removed after training, for --what=latency.", lower_bound=0
    )
    flags.DEFINE_list(
        "baselines", list(search_indexes.BUILD), "Indexes to compare, separated by commas."
    )
    flags.DEFINE_string("out", "search.json", "File that gathers results, for --what=approximate.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
