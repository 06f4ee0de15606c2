"""An index ready to search: kept, or built, tuned to a recall and kept; what is done is printed."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.search import cost as cost_lib
from vixml_jax.search import index, scann, tuning
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import Index
from vixml_jax.search.scann import ScannIndex
from vixml_jax.structs import SearchResult, Share


def open_index(
    vectors: Float[np.ndarray, "n e"] | Share,
    *,
    kind: str,
    directory: str = "",
    queries: Float[np.ndarray, "q e"] | None = None,
    k: int,
    recall: float = 0.99,
    sample: int = 1000,
    query_block: int = 1024,
    label_block: int = 65536,
    memory_gb: float = 0.0,
    mesh: Mesh | None = None,
    num_labels: int | None = None,
) -> Index:
    """The index to search these vectors with.

    A ScaNN index is read from `directory` if it is of these vectors, else built and kept there; and
    tuned, once for each k and recall, on a sample of the queries. Its settings then say `kind`,
    `k`, `recall_wanted`, the `recall` reached on the sample, and all that was measured, as `curve`.
    Where ScaNN cannot be imported a line says so, the settings say `wanted`, and search is exact.

    Args:
      vectors: Of the labels; over a mesh of several processes, for exact search, those held here.
      kind: 'exact' or 'scann'.
      directory: Where a ScaNN index is kept; empty: it is not.
      queries: Such as it will be searched for, to tune it on; None: it is searched as tuned before
        for the nearest k, or else as it was built.
      k: Results that will be judged.
      recall: Share of the exact k best to find, in (0, 1].
      sample: Queries that it is tuned on at most.
      query_block, label_block, mesh, num_labels: Of exact search; see `ExactIndex`.
      memory_gb: What may be taken on the host; 0: what the machine has left.

    Raises:
      InputError: If the memory does not suffice, or the index cannot be written.
    """
    values = vectors.values if isinstance(vectors, Share) else vectors
    limit = round(memory_gb * 2**30) or None
    blocks = {"query_block": query_block, "label_block": label_block}
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    # Other devices have a memory of their own.
    on_host = len(devices) if mesh is not None else 1
    exact_bytes = cost_lib.exact_bytes(*values.shape, devices=on_host, **blocks)
    exact_bytes *= devices[0].platform == "cpu"
    what = f"--search={kind}: {len(values):,} labels x {values.shape[1]}"

    def open_exact() -> ExactIndex:
        instead = "choose a smaller --search.query_block or --search.label_block, or more memory"
        cost_lib.check_room(exact_bytes, what, instead, limit=limit)
        found = ExactIndex(vectors, num_labels=num_labels, mesh=mesh, **blocks)
        found.settings.update(k=k, recall=1.0)
        return found

    if kind == "exact":
        return open_exact()
    if reason := scann.why_not():
        print(f"--search=scann: {reason}; searching exactly instead", flush=True)
        found = open_exact()
        found.settings["wanted"] = kind
        return found
    values = np.ascontiguousarray(values, np.float32)
    tunable = queries is not None and len(queries) > 0
    instead = "choose a machine with more memory, or --search=exact"
    held, tree = cost_lib.search_bytes(*values.shape), None
    if os.path.isdir(directory):
        cost_lib.check_room(held, what, instead, limit=limit)
        tree = _kept(directory, values)
    if tree is None:
        needed = max(held + exact_bytes * tunable, cost_lib.build_bytes(*values.shape))
        cost_lib.check_room(needed, what, instead, limit=limit)
        tree = _build(values, scann.settings_for(len(values)), directory)
    if not tree.settings["leaves"]:
        tree.settings.update(k=k, recall=1.0)
    elif point := _tuned_before(tree, k, recall, exactly=tunable):
        tree.use(point)
    elif tunable:
        chosen = np.random.default_rng(0).permutation(len(queries))[:sample]
        queries = queries[np.sort(chosen)]
        truth = open_exact().search(queries, k)
        point = _tune(tree, values, queries, truth, k, recall)
        if point["recall"] < recall and tree.settings["dimensions_per_block"] > 1:
            print(f"recall@{k} of {recall} is out of reach: building anew with finer codes")
            del tree
            tree = _build(values, scann.settings_for(len(values), fine=True), directory)
            point = _tune(tree, values, queries, truth, k, recall)
        if point["recall"] < recall:
            print(f"recall@{k} of {recall} is out of reach: searching for {point['recall']:.4f}")
        tree.use(point)
        if directory:
            with errors.writing(directory):
                tree.save_points(directory)
    else:
        print(f"index not tuned for recall@{k} of {recall}: no queries to tune it on", flush=True)
    return tree


def _kept(directory: str, vectors: Float[np.ndarray, "n e"]) -> ScannIndex | None:
    """The index in a directory; None: it is not of these vectors, or cannot be read."""
    start = time.perf_counter()
    try:
        found = ScannIndex.load(directory, vectors)
    except InputError as error:
        print(error, flush=True)  # Says what it found, and that it is to be built anew.
        return None
    print(f"{directory}: index read in {time.perf_counter() - start:.1f} s", flush=True)
    return found


def _build(
    vectors: Float[np.ndarray, "n e"], settings: dict[str, Any], directory: str
) -> ScannIndex:
    """A new index, kept in the directory."""
    count, width = vectors.shape
    seconds = cost_lib.build_seconds(count, width, settings["leaves"])
    needed = cost_lib.build_bytes(count, width) / 2**30
    what = f"building an index of {count:,} labels x {width}, {settings['leaves']:,} leaves"
    with _passing(what, seconds, f"up to {needed:.1f} GB"):
        tree = ScannIndex.build(vectors, settings)
    if directory:
        with errors.writing(directory):
            tree.save(directory)
        print(f"index kept in {directory}", flush=True)
    return tree


def _tuned_before(
    tree: ScannIndex, k: int, recall: float, *, exactly: bool
) -> dict[str, Any] | None:
    """How the index was tuned before, if it was.

    Args:
      tree: With its points.
      k, recall: Asked for.
      exactly: Whether a point for another k or recall will not do. Else the one for the least k
        that is not smaller, then for the recall next to what is asked.
    """

    def distance(point: dict[str, Any]) -> tuple[bool, int, float]:
        return point["k"] < k, abs(point["k"] - k), abs(point["recall_wanted"] - recall)

    nearest = min(tree.points, key=distance, default=None)
    if exactly and nearest is not None and distance(nearest) != (False, 0, 0.0):
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
    """The cheapest way to search a tree for a recall, or the widest if none reaches it.

    Args:
      tree: To be searched.
      vectors: Of its labels.
      queries: The sample.
      truth: What exact search finds of it.
      k: Results that count.
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
    # What less and more would find, for the curve of recall and speed.
    nearby = {
        max(1, min(leaves, round(chosen.leaves_searched * 2.0**step))) for step in range(-4, 5)
    }
    known = {one.leaves_searched for one in found if one.reordered == chosen.reordered}
    found += [measure(searched, chosen.reordered) for searched in sorted(nearby - known)]
    best = tuning.undominated(found, cost)
    print(f"tuned on {len(queries):,} queries for recall@{k} of {recall}:")
    print(tuning.table(best, chosen, k), flush=True)
    return {
        "k": k,
        "recall_wanted": recall,
        "recall": chosen.recall,
        "leaves_searched": chosen.leaves_searched,
        "reordered": chosen.reordered,
        "sample": len(queries),
        "curve": [one._asdict() for one in best],
    }


@contextlib.contextmanager
def _passing(what: str, seconds: float, more: str) -> Iterator[None]:
    """Tells how long a call takes that itself tells nothing: before, in a bar, and after.

    Args:
      what: Is done.
      seconds: It takes, about.
      more: What else is to be said before.
    """
    import tqdm

    print(f"{what}: about {seconds:.0f} s, {more}", flush=True)
    start, done = time.perf_counter(), threading.Event()
    form = "{desc}: {n:.0f} of about {total:.0f} s |{bar}|"
    # The estimate stands in for what is not known, so the bar waits at its end if it was too short.
    with tqdm.tqdm(total=seconds, desc=what, bar_format=form, delay=1, disable=None) as bar:

        def tick() -> None:
            while not done.wait(0.5):
                bar.n = min(time.perf_counter() - start, seconds)
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
    print(f"{what}: done in {time.perf_counter() - start:.0f} s", flush=True)
