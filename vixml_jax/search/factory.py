"""Opens a search index: loads it, or builds it, tunes it to a recall and saves it."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vixml_jax import errors
from vixml_jax.config import Config, SearchConfig
from vixml_jax.errors import InputError
from vixml_jax.runtime import console, progress
from vixml_jax.search import cost as cost_lib
from vixml_jax.search import index, scann, tuning
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.fusion import LabelRows
from vixml_jax.search.index import Index
from vixml_jax.search.int8 import RescoredIndex, quantised
from vixml_jax.search.prefix import Prefix, PrefixIndex
from vixml_jax.search.scann import ScannIndex
from vixml_jax.structs import SearchResult, Shard

SCANN_FROM = 20_000  # Labels from which on 'auto' prefers ScaNN; see docs/benchmarks.md, Search.


def open_index(
    vectors: Float[np.ndarray, "n e"] | LabelRows | Shard,
    *,
    kind: str,
    embedding: int | None = None,
    width: int = 0,
    dtype: str = "float32",
    directory: str = "",
    queries: Float[np.ndarray, "q e"] | None = None,
    weights: Sequence[float] = (),
    k: int,
    recall: float = 0.99,
    sample: int = 1000,
    query_block: int = 1024,
    label_block: int = 65536,
    memory_gb: float = 0.0,
    mesh: Mesh | None = None,
    num_labels: int | None = None,
) -> Index:
    """Returns an index over label vectors, ready to search.

    Whatever `width` is, it is searched with whole query vectors.

    A ScaNN index is loaded from `directory` if it is of these vectors; otherwise it is built and
    saved there. It is tuned on a sample of the queries, once for each k, recall and weights. Its
    settings then hold `kind`, `k`, `recall_wanted`, the `recall` reached on the sample, and all
    measurements as `curve`. Where ScaNN cannot be used, a message is printed, search is exact, and
    the settings hold `wanted`.

    With 'auto', nothing is built: search is by ScaNN where `directory` has an index of at least
    SCANN_FROM labels, which were searched on CPUs otherwise, and exact elsewhere.

    Args:
      vectors: Label vectors; for exact search over a mesh of several processes, a `Shard` with the
        rows of this process.
      kind: 'exact', 'scann' or 'auto'.
      embedding: Width of embeddings; vectors that are wider are fused. None: that of the vectors.
      width: Columns of embeddings that are searched; 0: all.
      dtype: 'float32', or 'int8' for exact search over vectors of 8 bits, the best of which are
        scored again (`int8.RescoredIndex`). With 'int8', `vectors` are kept.
      directory: Directory of the ScaNN index of all columns; those of fewer columns are beside it.
        Empty: it is not saved.
      queries: Typical queries, to tune the index on; None: it is searched as it was tuned before
        for the nearest k, or else as it was built.
      weights: Weights with which the query vectors are fused, which the recall depends on: the
        index is tuned for each. Empty: they are not fused.
      k: Results per query that will be evaluated.
      recall: Fraction of the exact k best labels to find, in (0, 1].
      sample: Maximum number of queries used for tuning.
      query_block, label_block, mesh, num_labels: See `ExactIndex`.
      memory_gb: Host memory that may be used, in GB (10^9 bytes); 0: all that is free.

    Raises:
      InputError: If the memory does not suffice, or the index cannot be written.
    """
    if not isinstance(vectors, Shard):
        vectors = Shard(np.arange(len(vectors)), vectors)
    embedding = embedding or vectors.values.shape[1]
    prefix = Prefix(embedding, width or embedding)
    shape = len(vectors.values), prefix.width(vectors.values.shape[1])
    limit = round(memory_gb * 1e9) or None
    blocks = {"query_block": query_block, "label_block": label_block}
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    num_devices = len(devices) if mesh is not None else 1
    exact_bytes = cost_lib.exact_bytes(*shape, devices=num_devices, dtype=dtype, **blocks)
    exact_bytes *= devices[0].platform == "cpu"  # Accelerators have memory of their own.
    what = f"--search={kind}: {shape[0]:,} labels x {shape[1]}"

    def open_exact() -> Index:
        remedy = "choose a smaller --search.query_block or --search.label_block, or more memory"
        cost_lib.check_memory(exact_bytes, what, remedy, limit=limit)
        read = prefix.read if dtype == "float32" else functools.partial(quantised, prefix=prefix)
        rows = vectors._replace(values=read(vectors.values))
        exact = ExactIndex(rows, num_labels=num_labels, mesh=mesh, **blocks)
        exact.settings.update(k=k, dtype=dtype)
        if dtype == "int8":
            return RescoredIndex(exact, vectors.values, prefix)
        exact.settings["recall"] = 1.0
        return exact

    def of_whole_queries(index: Index) -> Index:
        return index if prefix.is_all else PrefixIndex(index, prefix)

    directory = _directory_of(directory, prefix)
    if kind == "auto":
        on_cpus = devices[0].platform == "cpu" and dtype == "float32"
        if not on_cpus or shape[0] < SCANN_FROM or not os.path.isdir(directory):
            kind = "exact"
    if kind == "exact":
        return of_whole_queries(open_exact())
    if reason := scann.unavailable_reason():
        print(f"--search={kind}: {reason}; exact search is used instead", flush=True)
        exact = open_exact()
        exact.settings["wanted"] = kind
        return of_whole_queries(exact)
    values = np.ascontiguousarray(prefix.read(vectors.values))
    queries = queries if queries is None else prefix.queries(queries)
    tunable = queries is not None and len(queries) > 0
    remedy = "choose a machine with more memory, or --search=exact"
    search_bytes, tree = cost_lib.search_bytes(*values.shape), None
    if os.path.isdir(directory):
        cost_lib.check_memory(search_bytes, what, remedy, limit=limit)
        tree = _load(directory, values)
    if tree is None and kind == "auto":
        return of_whole_queries(open_exact())
    if tree is None:
        needed = max(search_bytes + exact_bytes * tunable, cost_lib.build_bytes(*values.shape))
        cost_lib.check_memory(needed, what, remedy, limit=limit)
        is_fused = vectors.values.shape[1] != embedding
        block = scann.FUSED_BLOCK if is_fused else scann.BLOCK
        settings = scann.settings_for(len(values), dimensions_per_block=block)
        tree = _build(values, settings, directory)
    if not tree.settings["leaves"]:
        tree.settings.update(k=k, recall=1.0)
    elif point := _tuned_before(tree, k, recall, weights, exactly=tunable):
        tree.use(point)
    elif tunable:
        chosen = np.random.default_rng(0).permutation(len(queries))[:sample]
        queries = queries[np.sort(chosen)]
        truth = open_exact().search(queries, k)
        point = _tune(tree, values, queries, truth, k, recall)
        unreachable = f"recall@{k} of {recall} cannot be reached"
        while point["recall"] < recall and (block := tree.settings["dimensions_per_block"]) > 1:
            console.status(f"{unreachable}: building the index again with finer codes")
            del tree
            finer = scann.settings_for(len(values), dimensions_per_block=block // 2)
            tree = _build(values, finer, directory)
            point = _tune(tree, values, queries, truth, k, recall)
        if weights:
            point["weights"] = list(weights)
        if point["recall"] < recall:
            print(f"{unreachable}: searching with recall {point['recall']:.4f}", flush=True)
        tree.use(point)
        if directory:
            with errors.writing(directory):
                tree.save_points(directory)
    else:
        console.status(f"index not tuned for recall@{k} of {recall}: no queries to tune it on")
    return of_whole_queries(tree)


def _directory_of(directory: str, prefix: Prefix) -> str:
    """Where the ScaNN index of a prefix is; empty: it is not saved."""
    return directory if prefix.is_all or not directory else f"{directory}-width_{prefix.used}"


def exact_index(vectors: Float[np.ndarray, "n w"], prefix: Prefix, mesh: Mesh | None) -> Index:
    """Returns exact search in float32 with the columns of a prefix, for whole query vectors."""
    index = ExactIndex(prefix.read(vectors), mesh=mesh)
    return index if prefix.is_all else PrefixIndex(index, prefix)


def check(kind: str, search: SearchConfig, run: Config, embedding: int) -> None:
    """Checks flags of a search against a run, and notes a width that it was not trained for.

    Such a width is no error: a pretrained tower may have been trained for it elsewhere.

    Args:
      kind: `--search`.
      search: The other flags of the search.
      run: Of the run.
      embedding: Width of its tower.

    Raises:
      InputError: If the flags cannot be combined, or the tower is narrower.
    """
    width, dtype, trained = search.width, search.dtype, run.loss.widths
    if not 0 <= width <= embedding:
        raise InputError(
            f"--search.width={width}: expected 0 to {embedding}, the width of the run's tower"
        )
    if kind == "scann" and dtype != "float32":
        raise InputError(
            f"--search.dtype={dtype}: works with --search=exact only; ScaNN has codes of its own"
        )
    if width not in (0, embedding, *trained):
        widths = ", ".join(map(str, sorted({*trained, embedding})))
        print(
            f"note: --search.width={width}: the run was trained for {widths} (--loss.widths); "
            "expect lower metrics"
        )


def _load(directory: str, vectors: Float[np.ndarray, "n e"]) -> ScannIndex | None:
    """Loads an index; returns None if it is of other vectors or cannot be read."""
    start = time.perf_counter()
    try:
        tree = ScannIndex.load(directory, vectors)
    except InputError as error:
        console.status(str(error))
        return None
    console.status(f"{directory}: index loaded in {time.perf_counter() - start:.1f} s")
    return tree


def _build(
    vectors: Float[np.ndarray, "n e"], settings: dict[str, Any], directory: str
) -> ScannIndex:
    """Builds an index and saves it to the directory, unless that is empty."""
    count, width = vectors.shape
    seconds = cost_lib.build_seconds(count, width, settings["leaves"])
    gigabytes = cost_lib.build_bytes(count, width) / 1e9
    what = f"building an index of {count:,} labels x {width}, {settings['leaves']:,} leaves"
    with _timed(what, seconds, f"up to {gigabytes:.1f} GB"):
        tree = ScannIndex.build(vectors, settings)
    if directory:
        with errors.writing(directory):
            tree.save(directory)
        console.status(f"{directory}: index saved")
    return tree


def _tuned_before(
    tree: ScannIndex, k: int, recall: float, weights: Sequence[float], *, exactly: bool
) -> dict[str, Any] | None:
    """Returns saved search settings for a k and recall; None if there are none.

    Args:
      tree: With its points.
      k, recall, weights: Wanted.
      exactly: Whether all of them must match. Otherwise the point with the least k that is not
        smaller is returned, and of several the one with the nearest recall, of the same weights if
        there is one.
    """

    def distance(point: dict[str, Any]) -> tuple[bool, int, float, bool]:
        is_other = point.get("weights", []) != list(weights)
        return point["k"] < k, abs(point["k"] - k), abs(point["recall_wanted"] - recall), is_other

    nearest = min(tree.points, key=distance, default=None)
    if exactly and nearest is not None and distance(nearest) != (False, 0, 0.0, False):
        return None
    return nearest


def _tune(
    tree: ScannIndex,
    vectors: Float[np.ndarray, "n e"],
    queries: Float[np.ndarray, "q e"],
    truth: SearchResult,
    k: int,
    recall: float,
) -> dict[str, Any]:
    """Returns the cheapest search settings that reach a recall, or the widest if none does.

    Args:
      tree: To be searched.
      vectors: Label vectors of the tree.
      queries: The sample.
      truth: Exact results of the sample.
      k: Results per query that count.
      recall: Wanted.
    """

    def measure(leaves_searched: int, reordered: int) -> tuning.Measurement:
        start = time.perf_counter()
        found = tree.search_with(queries, k, leaves_searched=leaves_searched, reordered=reordered)
        speed = len(queries) / (time.perf_counter() - start)
        reached = index.recall_against(truth, found, k)
        return tuning.Measurement(leaves_searched, reordered, reached, round(speed, 1))

    def cost(leaves_searched: int, reordered: int) -> float:
        return cost_lib.search_cost(
            tree.settings, *vectors.shape, leaves_searched=leaves_searched, reordered=reordered
        )

    leaves, most = tree.settings["leaves"], max(64 * k, 4096)
    found = tuning.frontier(
        measure,
        tuning.steps(1, leaves),
        tuning.steps(min(k, len(vectors)), min(most, len(vectors))),
        recall,
    )
    chosen = tuning.choose(found, recall, cost)
    # Measure fewer and more leaves as well, so that the curve shows recall against speed.
    nearby = {
        max(1, min(leaves, round(chosen.leaves_searched * 2.0**step))) for step in range(-4, 5)
    }
    known = {point.leaves_searched for point in found if point.reordered == chosen.reordered}
    found += [measure(searched, chosen.reordered) for searched in sorted(nearby - known)]
    best = tuning.undominated(found, cost)
    console.status(f"tuned on {len(queries):,} queries for recall@{k} of {recall}:")
    console.status(tuning.table(best, chosen, k))
    return {
        "k": k,
        "recall_wanted": recall,
        "recall": chosen.recall,
        "leaves_searched": chosen.leaves_searched,
        "reordered": chosen.reordered,
        "sample": len(queries),
        "curve": [point._asdict() for point in best],
    }


@contextlib.contextmanager
def _timed(what: str, seconds: float, more: str) -> Iterator[None]:
    """Reports a call that reports no progress itself: before, while it runs, and after.

    Args:
      what: Describes the call.
      seconds: Expected duration.
      more: Appended to the first message.
    """
    console.status(f"{what}: about {seconds:.0f} s, {more}")
    start, done, total = time.perf_counter(), threading.Event(), max(1, round(seconds))
    with progress.track("index build", total, unit="s") as advance:

        def tick() -> None:
            # Stops at the expected duration, since it is not known how much longer it takes.
            for _ in range(total):
                if done.wait(1.0):
                    break
                advance(1)

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
    console.status(f"{what}: done in {time.perf_counter() - start:.0f} s")
