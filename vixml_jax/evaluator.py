"""A model judged on a split: its labels and queries encoded, searched, measured."""

import dataclasses
import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import config as config_lib
from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation import neighbors
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.config import SearchConfig
from vixml_jax.data import propensity
from vixml_jax.data.store import Items, PreparedDataset
from vixml_jax.evaluation import knn_baseline, sliced_metrics, slices
from vixml_jax.evaluation import metrics as metrics_lib
from vixml_jax.evaluation.sliced_metrics import Judgement
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed
from vixml_jax.parallel.distributed import Group
from vixml_jax.search import index as index_lib
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.factory import open_index
from vixml_jax.search.index import Index
from vixml_jax.structs import LabelState, SearchResult, Share

TUNED_ON = 5000  # Validation queries at most.
# Vectors of the labels, and of the training queries or None.
Keep = Callable[[Float[np.ndarray, "n e"], Float[np.ndarray, "t e"] | None], None]
MEMORY = ", memory"  # Added to the name of what was found with memory.


class Found(NamedTuple):
    """An evaluation: what is written of it, and what a report is made from.

    Attributes:
      results: Values of json.
      searches: What was found, without filter pairs, by what is added to the name of the run.
      label_vectors: Unit vectors of the labels.
    """

    results: dict[str, Any]
    searches: dict[str, SearchResult]
    label_vectors: Share


def label_frequency(dataset: PreparedDataset) -> Int[np.ndarray, " l"]:
    """Training queries of each label."""
    return np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)


def inverse_propensity(dataset: PreparedDataset) -> Float[np.ndarray, " l"]:
    """Weights of the labels by their training frequency."""
    return propensity.inverse_propensity(
        label_frequency(dataset), len(dataset.train), dataset.propensity_a, dataset.propensity_b
    )


def measure(
    result: SearchResult,
    dataset: PreparedDataset,
    split: str,
    rows: Int[np.ndarray, " r"] | None = None,
) -> dict[str, float]:
    """The metrics of search results without filter pairs.

    Args:
      result: Of the queries of a split.
      dataset: Which has it.
      split: 'test', 'valid' or 'train'.
      rows: Which of its queries these are; None: all.
    """
    relevance = dataset.split(split)[1]
    return metrics_lib.compute_metrics(
        result.ids,
        relevance if rows is None else relevance[rows],
        inverse_propensity(dataset),
        recall_ks=_recall_ks(result.ids.shape[1]),
    )


def judge(result: SearchResult, dataset: PreparedDataset, split: str) -> Judgement:
    """All there is to say of search results without filter pairs: by query, label and groups."""
    queries, relevance, _ = dataset.split(split)
    frequency = label_frequency(dataset)
    occurrences = np.bincount(relevance.indices, minlength=dataset.num_labels)
    return sliced_metrics.judge(
        result.ids,
        relevance,
        inverse_propensity(dataset),
        label_groups={
            "label frequency": slices.by_frequency(frequency),
            "frequency decile": slices.by_decile(frequency, occurrences),
        },
        query_groups={
            "pictures": slices.by_pictures(queries),
            "text length": slices.by_length(np.asarray(queries.whole)),
        },
        recall_ks=_recall_ks(result.ids.shape[1]),
    )


def _recall_ks(k: int) -> tuple[int, ...]:
    return tuple(r for r in (10, 100) if r <= k)


def metric_names(k: int) -> list[str]:
    """What `measure` measures, where k labels are kept of each query."""
    nothing = np.full((1, k), -1), sparse.csr_matrix((1, 1)), np.ones(1)
    return list(metrics_lib.compute_metrics(*nothing, recall_ks=_recall_ks(k)))


def evaluate_model(*args: Any, **settings: Any) -> dict[str, Any]:
    """What is written of `search_model`, with the same arguments."""
    return search_model(*args, **settings).results


def search_model(
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    *,
    split: str = "test",
    search: str = "exact",
    searched: SearchConfig = config_lib.SEARCH,
    k: int,
    block: int,
    mixing: Mixing | None = None,
    tune: Sequence[str] = (),
    index_dir: str | None = None,
    keep: Keep | None = None,
    titles: bool = True,
    group: Group = distributed.ALONE,
) -> Found:
    """Metrics of a model on a split, with counts and seconds of each phase.

    Args:
      model, params, labels: What to judge.
      dataset: Prepared data of the run.
      split: 'test', 'valid' or 'train'.
      search: 'exact' or 'scann'.
      searched: How, in detail.
      k: Labels kept of each query after filtering.
      block: Items encoded at a time.
      mixing: How the labels of near training queries shall count; the metrics with them stand under
        `with_memory`. None: they do not.
      tune: Metrics whose mean on the validation split chooses another mixing first; none: it stays.
      index_dir: Where ScaNN indexes are kept; needed for 'scann'.
      keep: Is given the vectors of the labels and, with memory, of the training queries; None:
        nobody wants them.
      titles: Whether to show progress.
      group: The processes of the model's mesh.
    """
    queries, _, pairs = dataset.split(split)
    seconds, clock = {}, time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal clock
        seconds[phase], clock = time.perf_counter() - clock, time.perf_counter()

    label_vectors = model.encode_labels(
        params, labels, dataset.labels, block=block, title="labels" if titles else ""
    )
    lap("encode_labels")

    def encode(items: Items, title: str) -> Float[np.ndarray, "n e"]:
        share = model.encode_queries(params, items, block=block, title=title if titles else "")
        return distributed.whole(share, len(items), group)

    query_vectors = encode(queries, f"{split} queries")
    lap("encode_queries")
    index = open_index(
        label_vectors,
        kind=search,
        directory=os.path.join(index_dir, "labels") if index_dir else "",
        queries=query_vectors,
        k=k,
        mesh=model.mesh,
        num_labels=dataset.num_labels,
        **dataclasses.asdict(searched),
    )
    lap("index")
    result = index_lib.search_filtered(index, query_vectors, pairs, k)
    lap("search")
    settings = {"kind": search, **index.settings, "k": k}
    settings[f"recall@{k}"] = _recall(index, label_vectors, query_vectors, k, model, dataset)
    lap("recall")
    results = measure(result, dataset, split)
    lap("metrics")
    remembered, searches = {}, {"": result}
    if keep is not None and mixing is None:
        keep(label_vectors.values, None)
    if mixing is not None or tune:
        vectors = query_vectors if split == "train" else encode(dataset.train, "training queries")
        lap("encode_memory")
        if keep is not None:
            keep(label_vectors.values, vectors)
        memory = open_index(
            vectors,
            kind=search,
            directory=os.path.join(index_dir, "memory") if index_dir else "",
            queries=query_vectors,
            k=min(k, len(vectors)) if mixing is None else min(mixing.k, len(vectors)),
            mesh=model.mesh,
            **dataclasses.asdict(searched),
        )
        lap("index_memory")
        if tune:
            vectors = encode(dataset.valid, "valid queries")
            mixing, remembered["tuning"] = tune_mixing(
                index, memory, vectors, dataset, tune, k, titles
            )
            lap("tuning")
        itself = np.arange(len(query_vectors)) if split == "train" else None
        near = neighbors.nearest(memory, query_vectors, max(mixing.k, k), itself)
        mixed = mixing_lib.mix_in_memory(
            result, near, dataset.train_relevance, mixing, k, pairs if len(pairs) else None
        )
        remembered["with_memory"] = measure(mixed, dataset, split)
        remembered["mixing"] = mixing._asdict()
        lap("mixing")
        searches[MEMORY] = mixed
    results = {
        "metrics": results,
        **remembered,
        "counts": {
            "queries": len(queries),
            "labels": dataset.num_labels,
            "filter_pairs": len(pairs),
        },
        "search": settings,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }
    return Found(results, searches, label_vectors)


def tune_mixing(
    index: Index,
    memory: Index,
    vectors: Float[np.ndarray, "v e"],
    dataset: PreparedDataset,
    names: Sequence[str],
    k: int,
    titles: bool = True,
) -> tuple[Mixing, list[dict[str, Any]]]:
    """The mixing with the best mean of some metrics on the validation split.

    Args:
      index, memory: Of the labels and of the training queries.
      vectors: Of all validation queries; at most TUNED_ON of them, drawn at random, are used.
      dataset: With a validation split.
      names: Metrics that `measure` measures.
      k: Labels kept of each query.
      titles: Whether to show progress.

    Returns:
      The mixing, and all that were tried with their values, best first.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(vectors))[:TUNED_ON])
    pairs = index_lib.pairs_of(dataset.split("valid")[2], rows)
    most = min(max(mixing_lib.KS), len(dataset.train))

    def judge(result: SearchResult) -> float:
        found = measure(result, dataset, "valid", rows)
        return float(np.mean([found[name] for name in names]))

    tried = mixing_lib.tune(
        index_lib.search_filtered(index, vectors[rows], pairs, k),
        neighbors.nearest(memory, vectors[rows], max(most, k)),
        dataset.train_relevance,
        judge,
        mixing_lib.grid(most),
        "memory tuned" if titles else "",
        pairs if len(pairs) else None,
    )
    return tried[0][0], [{**mixing._asdict(), "value": value} for mixing, value in tried]


def _recall(
    index: Index,
    labels: Share,
    queries: Float[np.ndarray, "q e"],
    k: int,
    model: Model,
    dataset: PreparedDataset,
) -> float:
    """The share of the exact k best labels that an index finds, of a sample of the queries."""
    if isinstance(index, ExactIndex):
        return 1.0
    sample = queries[np.random.default_rng(1).permutation(len(queries))[:1000]]
    exact = ExactIndex(labels, num_labels=dataset.num_labels, mesh=model.mesh)
    return index_lib.recall_against(exact.search(sample, k), index.search(sample, k), k)


def without_images(dataset: PreparedDataset, split: str) -> PreparedDataset:
    """The data with the pictures of one split's queries hidden."""
    bare = dataclasses.replace(getattr(dataset, split), images=None)
    return dataclasses.replace(dataset, **{split: bare})


def baselines(dataset: PreparedDataset, k: int, split: str = "test") -> dict[str, SearchResult]:
    """The nearest-neighbour votes that the data allow: text, pictures, both."""
    pairs = dataset.split(split)[2]
    fetched = min(k + index_lib.over_fetch(pairs), dataset.num_labels)
    kinds = ["text"] + (["picture", "both"] if dataset.image_width else [])
    found = {kind: knn_baseline.vote(dataset, split=split, by=kind, k=fetched) for kind in kinds}
    return {f"vote, {kind}": index_lib.drop_filtered(found[kind], pairs, k) for kind in kinds}
