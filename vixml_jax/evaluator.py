"""Evaluation of a model on a split: encode labels and queries, search, compute metrics."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import config as config_lib
from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation import neighbours, tuning
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.augmentation.scored_search import ScoredSearch
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.config import SearchConfig
from vixml_jax.data import propensity
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.evaluation import knn_baseline, per_query, sliced_metrics, slices
from vixml_jax.evaluation import metrics as metrics_lib
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.evaluation.sliced_metrics import SlicedMetrics
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed
from vixml_jax.parallel.distributed import Group
from vixml_jax.runtime import host_memory
from vixml_jax.search import cost
from vixml_jax.search import index as index_lib
from vixml_jax.search.factory import open_index
from vixml_jax.search.fusion import Fusion
from vixml_jax.search.index import Index
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import LabelState, SearchResult, Shard

_RESULT_BYTES = 24  # Of a label of a query: scores and ids, found, filtered and mixed.
MAX_TUNING_QUERIES = 5000  # Validation queries used for tuning.
# Called with the vectors of the labels, and those of the training queries or None.
SaveVectors = Callable[[Float[np.ndarray, "n e"], Float[np.ndarray, "t e"] | None], None]
NEIGHBOURS = ", with neighbours"  # Appended to the row name of results with training neighbours.


class Evaluation(NamedTuple):
    """The results of an evaluation, and what a report needs in addition.

    Attributes:
      results: Contents of the JSON file.
      searches: Search results without filter pairs, by the suffix of their row name: "", and
        NEIGHBOURS if training neighbours are used.
      label_vectors: Unit prototypes of the labels.
    """

    results: dict[str, Any]
    searches: dict[str, SearchResult]
    label_vectors: Shard


def label_frequency(dataset: PreparedDataset) -> Int[np.ndarray, " l"]:
    """Returns the number of training queries of each label."""
    return np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)


def inverse_propensity(dataset: PreparedDataset) -> Float[np.ndarray, " l"]:
    """Returns the inverse propensity of each label, from its training frequency."""
    return propensity.inverse_propensity(
        label_frequency(dataset), len(dataset.train), dataset.propensity_a, dataset.propensity_b
    )


def measure(
    result: SearchResult,
    dataset: PreparedDataset,
    split: str,
    rows: Int[np.ndarray, " r"] | None = None,
) -> dict[str, float]:
    """Returns the metrics of search results, in percent.

    Args:
      result: Labels found for the queries, filter pairs removed.
      dataset: Prepared data.
      split: 'test', 'valid' or 'train'.
      rows: Queries of the split that the result is for; None: all.
    """
    relevance = dataset.split(split)[1]
    return metrics_lib.compute_metrics(
        result.ids,
        relevance if rows is None else relevance[rows],
        inverse_propensity(dataset),
        **metrics_lib.cuts(result.ids.shape[1]),
    )


def slice_metrics(result: SearchResult, dataset: PreparedDataset, split: str) -> SlicedMetrics:
    """Returns metrics of search results per query and per group.

    Args:
      result: Labels found for all queries of the split, filter pairs removed.
      dataset: Prepared data.
      split: 'test', 'valid' or 'train'.
    """
    queries, relevance, _ = dataset.split(split)
    frequency = label_frequency(dataset)
    occurrences = np.bincount(relevance.indices, minlength=dataset.num_labels)
    return sliced_metrics.compute(
        result.ids,
        relevance,
        inverse_propensity(dataset),
        label_groups={
            "label frequency": slices.by_frequency(frequency),
            "frequency decile": slices.by_decile(frequency, occurrences),
        },
        query_groups={
            "images": slices.by_images(queries),
            "text length": slices.by_length(np.asarray(queries.full_lengths)),
        },
        **metrics_lib.cuts(result.ids.shape[1]),
    )


def metric_names(k: int) -> list[str]:
    """Returns the names of the metrics that `measure` computes for k labels per query."""
    empty = np.full((1, k), -1), sparse.csr_matrix((1, 1)), np.ones(1)
    return list(metrics_lib.compute_metrics(*empty, **metrics_lib.cuts(k)))


def check_metric_names(flag: str, names: Sequence[str], k: int) -> None:
    """Checks that `measure` computes the metrics that a flag names.

    Raises:
      InputError: If it does not.
    """
    known = metric_names(k)
    for name in names:
        if name not in known:
            raise InputError(f"--{flag}={name}: expected metrics among {', '.join(known)}")


def evaluate_model(*args: Any, **settings: Any) -> dict[str, Any]:
    """Returns the results of `search_model`, which has the same arguments."""
    return search_model(*args, **settings).results


def search_model(
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    *,
    split: str = "test",
    search: str = "exact",
    search_config: SearchConfig = config_lib.SEARCH,
    k: int,
    block: int,
    scoring: Scoring = settings_lib.COSINES,
    tune: Sequence[str] = (),
    index_dir: str | None = None,
    vectors: VectorStore | None = None,
    save: SaveVectors | None = None,
    titles: bool = True,
    group: Group = distributed.ALONE,
) -> Evaluation:
    """Evaluates a model on a split.

    Args:
      model, params, labels: The model. It has a label head if `params` have one.
      dataset: Prepared data of the run.
      split: 'test', 'valid' or 'train'.
      search: 'exact' or 'scann'.
      search_config: Settings of the search.
      k: Labels per query after filtering.
      block: Items encoded at a time.
      scoring: Weights of prototypes, label head and training neighbours; `fusion` is needed if the
        model has a label head. The metrics with neighbours are under `with_neighbours` of the
        results.
      tune: Metrics whose mean on the validation split selects the scoring, which then replaces
        `scoring`; empty: no tuning.
      index_dir: Directory of ScaNN indexes; needed for 'scann'.
      vectors: Vectors of this model and data. What it has is not encoded again, and what is encoded
        is added. None: everything is encoded.
      save: Called with the vectors of the labels and, with training neighbours, of the training
        queries.
      titles: Whether to show progress.
      group: The processes of the model's mesh.

    Returns:
      Metrics, counts and seconds per phase as `results`, and the search results.
    """
    items, relevance, pairs = dataset.split(split)
    most = min(max(k, scoring.mixing.k if scoring.mixing else 0), max(len(dataset.train), k))
    cost.check_memory(
        _RESULT_BYTES * len(items) * most,
        f"the results of {len(items):,} queries, {most:,} each,",
        "lower --eval.k or --knn.k",
    )
    seconds, clock = {}, time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal clock
        seconds[phase], clock = time.perf_counter() - clock, time.perf_counter()

    scored = ScoredSearch(model, params, labels, dataset, block, vectors, titles, group)
    scoring = scored.check(scoring)
    label_vectors = scored.labels()
    lap("encode_labels")
    queries = scored.queries(split)
    lap("encode_queries")
    searched = scored.label_rows(label_vectors)
    index = open_index(
        searched,
        kind=search,
        embedding=model.table.width,
        directory=os.path.join(index_dir, "labels") if index_dir else "",
        queries=scored.search_vectors(queries, scoring.fusion),
        weights=scoring.fusion or (),
        k=k,
        mesh=model.mesh,
        num_labels=dataset.num_labels,
        **dataclasses.asdict(search_config),
    )
    lap("index")
    tried, train_vectors, train_index = [], None, None
    if scoring.mixing is not None or tune:
        train_vectors = queries.vectors if split == "train" else scored.vectors_of("train")
        lap("encode_training_queries")
        mixing_k = k if scoring.mixing is None else scoring.mixing.k
        train_index = open_index(
            train_vectors,
            kind=search,
            directory=os.path.join(index_dir, "training_queries") if index_dir else "",
            queries=queries.vectors,
            k=min(mixing_k, len(train_vectors)),
            mesh=model.mesh,
            **dataclasses.asdict(search_config),
        )
        lap("index_training_queries")
    if save is not None:
        if train_vectors is None and "head" in params:  # New labels are compared with them.
            train_vectors = scored.vectors_of("train")
        save(label_vectors.values, train_vectors)
    if tune:
        tried = tune_scoring(scored, index, train_index, scoring.fusion, tune, k)
        scoring = settings_lib.best_of(tried)
        lap("tuning")

    alone = scoring.without_neighbours()
    result = scored.search(index, queries, pairs, k, alone.fusion)
    lap("search")
    settings = {"kind": search, **index.settings, "k": k}
    settings[f"recall@{k}"] = _recall(
        index, searched, scored.search_vectors(queries, alone.fusion), k, model, search_config
    )
    lap("recall")
    about: dict[str, Any] = {"metrics": measure(result, dataset, split)}
    lap("metrics")
    searches = {"": result}
    if alone.fusion is not None:
        settings["log_sum"] = index.log_sum
        about["fusion"] = alone.fusion._asdict()
    if tried:
        about["tuning"] = tried
    if scoring.mixing is not None:
        mixing, found = scoring.mixing, result
        if scoring.fusion != alone.fusion:
            found = scored.search(index, queries, pairs, k, scoring.fusion)
        itself = np.arange(len(items)) if split == "train" else None
        num_near = min(max(mixing.k, k), len(train_vectors))
        nearest = neighbours.nearest(train_index, queries.vectors, num_near, itself)
        searches[NEIGHBOURS] = mixing_lib.mix_neighbours(
            found,
            nearest,
            dataset.train_relevance,
            mixing,
            k,
            pairs if len(pairs) else None,
            as_probabilities=scoring.fusion is not None,
        )
        about["with_neighbours"] = measure(searches[NEIGHBOURS], dataset, split)
        about["mixing"] = mixing._asdict()
        if scoring.fusion is not None:
            about["fusion_with_neighbours"] = scoring.fusion._asdict()
        lap("mixing")
    results = {
        **about,
        "counts": {
            "queries": len(items),
            "queries_without_labels": int(np.count_nonzero(np.diff(relevance.indptr) == 0)),
            "labels": dataset.num_labels,
            "filter_pairs": len(pairs),
        },
        "search": settings,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_gib": round(host_memory.peak_host_memory() / 2**30, 3),
    }
    return Evaluation(results, searches, label_vectors)


def tune_scoring(
    scored: ScoredSearch,
    index: Index,
    train_index: Index,
    trained: Fusion | None,
    names: Sequence[str],
    k: int,
) -> list[dict[str, Any]]:
    """Evaluates scorings by metrics on the validation split; see `augmentation.tuning.tune`.

    Args:
      scored: Vectors of the model.
      index: Index of the labels.
      train_index: Index of the training queries.
      trained: Weights of the run's flags, which are tried too; None: the model has no label head.
      names: Names of metrics that `measure` returns; scorings are compared by their mean.
      k: Labels per query.

    Returns:
      Rows of `settings.to_row`: the one to use, that without training neighbours, and all others,
      best first; see `without_chance`.
    """
    dataset = scored.dataset
    queries = scored.queries("valid")
    # The sample is random, but always the same.
    rows = np.sort(np.random.default_rng(0).permutation(len(queries.vectors))[:MAX_TUNING_QUERIES])
    queries = queries.at(rows)
    _, relevance, pairs = dataset.split("valid")
    pairs = index_lib.pairs_of(pairs, rows)
    most = min(max(mixing_lib.KS), len(dataset.train))
    columns = min(k, max(5, *(int(name.partition("@")[2] or k) for name in names)))
    validation = tuning.Validation(
        neighbours.nearest(train_index, queries.vectors, max(most, k)),
        relevance[rows],
        dataset.train_relevance,
        pairs,
        columns,
    )
    weights = inverse_propensity(dataset)

    def evaluate(result: SearchResult) -> float:
        metrics = metrics_lib.compute_metrics(
            result.ids, validation.truth, weights, **metrics_lib.cuts(columns)
        )
        return float(np.mean([metrics[name] for name in names]))

    fusions = [trained] if trained is None else list(dict.fromkeys([trained, *tuning.FUSIONS]))
    found = {fusion: scored.search(index, queries, pairs, k, fusion) for fusion in fusions}
    mixings = mixing_lib.grid(most, joint=trained is None)
    tried = tuning.tune(
        found, validation, evaluate, mixings, title="tuning" if scored.titles else ""
    )

    def terms(row: dict[str, Any]) -> PerQuery:
        result = tuning.rankings(found, validation, settings_lib.from_row(row))
        return sliced_metrics.compute(
            result.ids,
            validation.truth,
            weights,
            label_groups={},
            query_groups={},
            **metrics_lib.cuts(columns),
        ).queries

    return without_chance(tried, trained, terms, names)


def without_chance(
    tried: list[dict[str, Any]],
    trained: Fusion | None,
    terms: Callable[[dict[str, Any]], PerQuery],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Puts the scoring first that is to be used, and of those without neighbours that one first.

    Of hundreds of scorings, one is a little better than the others by chance alone. Other weights
    of prototypes and head than those of the run's flags must be better by the standard error of the
    difference, with training neighbours and without, and so must scorings with neighbours be.

    Args:
      tried: Rows of `settings.to_row`, best first.
      trained: Weights of the run's flags; None: the model has no label head.
      terms: Returns the terms of the metrics per query of a row.
      names: The metrics. Coverage, which is no mean over queries, does not count.
    """

    def preferred(rows: list[dict[str, Any]], is_simple: Callable[[dict], bool]) -> dict[str, Any]:
        """The best row, or the best simple one if the best is not better than it beyond chance."""
        best, simple = rows[0], next(filter(is_simple, rows), None)
        if simple is None or is_simple(best):
            return best
        one, other = terms(best), terms(simple)
        means = [name for name in names if name in one.names]
        if means:
            gain, error = per_query.gain(one, other, means)
            if gain < error:
                return simple
        return best

    def has_own_weights(row: dict[str, Any]) -> bool:
        return settings_lib.from_row(row).fusion == trained

    alone = preferred([row for row in tried if not row["weight"]], has_own_weights)
    first = [alone]
    if mixed := [row for row in tried if row["weight"]]:
        with_neighbours = preferred(mixed, has_own_weights)
        pair = sorted([alone, with_neighbours], key=lambda row: -row["value"])
        if preferred(pair, lambda row: not row["weight"]) is with_neighbours:
            first = [with_neighbours, alone]
    return [*first, *(row for row in tried if all(row is not one for one in first))]


def _recall(
    index: Index,
    labels: Shard,
    queries: Float[np.ndarray, "q e"],
    k: int,
    model: Model,
    search_config: SearchConfig,
) -> float:
    """Returns the recall of an index against exact search, on a sample of the queries.

    Exact search is in float32, by vectors of the same width.
    """
    if index.settings["kind"] == "exact" and index.settings["dtype"] == "float32":
        return 1.0
    sample = queries[np.random.default_rng(1).permutation(len(queries))[:1000]]
    exact = open_index(
        labels,
        kind="exact",
        embedding=model.table.width,
        k=k,
        mesh=model.mesh,
        num_labels=model.table.num_labels,
        **dataclasses.asdict(search_config) | {"dtype": "float32"},
    )
    return index_lib.recall_against(exact.search(sample, k), index.search(sample, k), k)


def without_images(dataset: PreparedDataset, split: str) -> PreparedDataset:
    """Returns the data set without the images of one split's queries."""
    queries = dataclasses.replace(getattr(dataset, split), images=None)
    return dataclasses.replace(dataset, **{split: queries})


def baselines(dataset: PreparedDataset, k: int, split: str = "test") -> dict[str, SearchResult]:
    """Returns results of the kNN baseline by text and, if the data have images, by image and both.

    Args:
      dataset: Prepared data.
      k: Labels per query after filtering.
      split: 'test' or 'valid'.

    Returns:
      Search results without filter pairs, by row name: 'kNN baseline, text' and so on.
    """
    pairs = dataset.split(split)[2]
    fetched = min(k + index_lib.over_fetch(pairs), dataset.num_labels)
    results = {}
    for kind in ("text", "image", "both") if dataset.image_width else ("text",):
        result = knn_baseline.predict(dataset, split=split, by=kind, k=fetched)
        results[f"kNN baseline, {kind}"] = index_lib.drop_filtered(result, pairs, k)
    return results
