"""Quality of a run against the size of its vectors: fewer columns, and 8 bits.

    python -m vixml_jax.benchmarks.serving.vector_sizes --runs=RUN,OTHER [--split=valid]

Each run is evaluated on a split at each width (`--search.width`) in float32 and int8
(`--search.dtype`), by exact search, with the fusion of its flags and without training neighbours.
The error of the log-sum, from which probabilities follow, is that of int8 to float32 of this width.
All searches are timed in turns on the same queries, and their times divided by that of full float32
vectors in the same round. Vectors are encoded once and kept in the run directory.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float

from vixml_jax import command_line, evaluator, saved_model
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.augmentation.scored_search import ScoredSearch
from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed
from vixml_jax.runtime import compilation_cache
from vixml_jax.search import factory
from vixml_jax.search import index as index_lib
from vixml_jax.search.index import Index
from vixml_jax.storage.vector_store import VectorStore

K = 100
METRICS = ("P@1", "P@5", "PSP@5", "R@100")
DTYPES = ("float32", "int8")


class Row(NamedTuple):
    """One size of the vectors of a run.

    Attributes:
      width, dtype: As `--search.width` and `--search.dtype`.
      metrics: In percent, by name.
      bytes: Of a label in the index.
      log_sum: Largest difference of a query's log-sum from that of float32.
      slower: Time of a search, divided by that with full float32 vectors: median, least, most.
    """

    width: int
    dtype: str
    metrics: dict[str, float]
    bytes: float
    log_sum: float
    slower: tuple[float, float, float]


def measure(workdir: str, values: Any) -> list[Row]:
    """Returns the results of a run, the full float32 vectors first.

    Args:
      workdir: Of the run.
      values: Parsed flags.

    Raises:
      InputError: If a width is more than that of the run.
    """
    config = workdir_lib.read_config(workdir, data=values.data)
    dataset = workdir_lib.open_run_dataset(config, "")
    tower, layout = workdir_lib.read_tower(workdir)
    widths = sorted({*map(int, values.widths), tower.width}, reverse=True)
    if widths[0] > tower.width or widths[-1] < 1:
        raise InputError(
            f"--widths={','.join(values.widths)}: expected 1 to {tower.width}, the width of "
            f"--runs={workdir}"
        )
    mesh = workdir_lib.make_mesh(config)
    model = workdir_lib.build_model(config, tower, layout, dataset.num_labels, mesh)
    with saved_model.opened(workdir) as saved:
        params, labels = saved.restore(model)
        store = VectorStore(workdir, saved.vectors_step, dataset.content_hash, num_processes=1)
    scored = ScoredSearch(
        model, params, labels, dataset, config.eval.block, store, True, distributed.ALONE
    )
    fusion = scored.check(settings_lib.as_trained(config)).fusion
    rows, queries = scored.label_rows(scored.labels()), scored.queries(values.split)
    searched, pairs = scored.search_vectors(queries, fusion), dataset.split(values.split)[2]
    sizes = [(width, dtype) for width in widths for dtype in DTYPES]
    indexes = [
        factory.open_index(
            rows, kind="exact", embedding=tower.width, width=width, dtype=dtype, k=K, mesh=mesh
        )
        for width, dtype in sizes
    ]
    found = [index_lib.search_filtered(index, searched, pairs, K) for index in indexes]
    chosen = np.random.default_rng(0).permutation(len(searched))[: values.queries]
    log_sums = [index.search_normalised(searched, K).log_sum for index in indexes]
    # Sizes alternate between both types.
    errors = [
        float(np.abs(found - exact).max())
        for pair in zip(log_sums[::2], log_sums[1::2], strict=True)
        for found, exact in ((pair[0], pair[0]), (pair[1], pair[0]))
    ]
    timed = time_in_turns(indexes, searched[chosen], values.rounds)
    return [
        Row(
            *size,
            evaluator.measure(result, dataset, values.split),
            index.settings["bytes_per_label"],
            error,
            slower,
        )
        for size, result, index, error, slower in zip(
            sizes, found, indexes, errors, timed, strict=True
        )
    ]


def time_in_turns(
    indexes: Sequence[Index], queries: Float[np.ndarray, "q w"], rounds: int
) -> list[tuple[float, float, float]]:
    """Returns the time of each index by that of the first: median, least and most over rounds."""

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    searches = [functools.partial(index.search, queries, K) for index in indexes]
    for search in searches:
        search()  # Compiles.
    times = np.array([[seconds(search) for search in searches] for _ in range(rounds)])
    ratios = (times / times[:, :1]).T
    return [(statistics.median(x), min(x), max(x)) for x in ratios.tolist()]


def table(rows: Sequence[Row]) -> str:
    """Returns the results of a run as a Markdown table."""
    names = "width", "vectors", *METRICS, "bytes per label", "log-sum error", "search time"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        metrics = [f"{row.metrics[name]:.2f}" for name in METRICS]
        slower = "{:.2f} ({:.2f} to {:.2f})".format(*row.slower)
        cells = row.width, row.dtype, *metrics, f"{row.bytes:,.0f}", f"{row.log_sum:.1e}", slower
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.runs:
        raise InputError("--runs: missing; expected run directories that train wrote")
    compilation_cache.enable(values.compile_cache)
    for workdir in values.runs:
        print(f"{workdir}, {values.split} split:\n\n{table(measure(workdir, values))}\n")


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list("runs", [], "Run directories to evaluate, one table each.")
    flags.DEFINE_string("data", "", "Prepared data of the runs, if moved since training.")
    flags.DEFINE_enum("split", "valid", ["valid", "test"], "Split to evaluate.")
    flags.DEFINE_list("widths", ["64", "128", "256"], "Widths beside the full one.")
    flags.DEFINE_integer("queries", 1000, "Queries of a timed search.", lower_bound=1)
    flags.DEFINE_integer("rounds", 9, "Timed rounds.", lower_bound=1)
    compilation_cache.define_flag()


if __name__ == "__main__":
    command_line.launch(main, define_flags)
