"""The door that judges a run: encode, search, measure, and write it all down."""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import config as config_lib
from vixml_jax import errors, memory, processes, programs, remote, retrieval, runs, whole
from vixml_jax.config import Config, SearchConfig
from vixml_jax.data import propensity
from vixml_jax.data.store import Items, PreparedDataset
from vixml_jax.encoding import Model
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, breakdown, groups, render, report, vote
from vixml_jax.evaluation import metrics as metrics_lib
from vixml_jax.evaluation import page as page_lib
from vixml_jax.evaluation import per_query as per_query_lib
from vixml_jax.evaluation.breakdown import Judgement
from vixml_jax.processes import Group
from vixml_jax.search import augmented
from vixml_jax.search import index as index_lib
from vixml_jax.search.augmented import Mixing
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import Index
from vixml_jax.search.opening import open_index
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
    return breakdown.judge(
        result.ids,
        relevance,
        inverse_propensity(dataset),
        label_groups={
            "label frequency": groups.by_frequency(frequency),
            "frequency decile": groups.by_decile(frequency, occurrences),
        },
        query_groups={
            "pictures": groups.by_pictures(queries),
            "text length": groups.by_length(np.asarray(queries.whole)),
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
    group: Group = processes.ALONE,
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
        return processes.whole(share, len(items), group)

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
        near = retrieval.nearest(memory, query_vectors, max(mixing.k, k), itself)
        mixed = augmented.mix_in_memory(
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
    most = min(max(augmented.KS), len(dataset.train))

    def judge(result: SearchResult) -> float:
        found = measure(result, dataset, "valid", rows)
        return float(np.mean([found[name] for name in names]))

    tried = augmented.tune(
        index_lib.search_filtered(index, vectors[rows], pairs, k),
        retrieval.nearest(memory, vectors[rows], max(most, k)),
        dataset.train_relevance,
        judge,
        augmented.grid(most),
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


def write_results(workdir: str, name: str, results: dict[str, Any]) -> str:
    """Writes the contract's json, metrics at its top level; returns its path."""
    path = os.path.join(workdir, "evaluation", f"{name}.json")
    flat = {**results["metrics"], **{k: v for k, v in results.items() if k != "metrics"}}
    report.write_json(path, flat)
    return path


def baselines(dataset: PreparedDataset, k: int, split: str = "test") -> dict[str, SearchResult]:
    """The nearest-neighbour votes that the data allow: text, pictures, both."""
    pairs = dataset.split(split)[2]
    fetched = min(k + index_lib.over_fetch(pairs), dataset.num_labels)
    kinds = ["text"] + (["picture", "both"] if dataset.image_width else [])
    found = {kind: vote.vote(dataset, split=split, by=kind, k=fetched) for kind in kinds}
    return {f"vote, {kind}": index_lib.drop_filtered(found[kind], pairs, k) for kind in kinds}


def show(
    config: Config,
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    *,
    split: str,
    search: str,
    searched: SearchConfig = config_lib.SEARCH,
    mixing: Mixing | None = None,
    tune: Sequence[str] = (),
    hide_images: bool = False,
    keep: Keep | None = None,
    with_report: bool = False,
    group: Group = processes.ALONE,
) -> dict[str, Any]:
    """Evaluates, writes the json and what each query adds, prints the table and where it lies.

    Args:
      config, model, params, labels, dataset, split, search, searched, mixing, tune, keep, group: As
        of `search_model`.
      hide_images: Whether queries are judged by their texts alone.
      with_report: Whether to write the page, too; by one process alone.

    Returns:
      What is written.
    """
    if hide_images:
        dataset = without_images(dataset, split)
    k = min(config.eval.k, dataset.num_labels)
    found = search_model(
        model,
        params,
        labels,
        dataset,
        split=split,
        search=search,
        searched=searched,
        k=k,
        block=config.eval.block,
        mixing=mixing,
        tune=tune,
        index_dir=os.path.join(config.workdir, "evaluation", "scann"),
        keep=keep,
        group=group,
    )
    if group.index:  # The first process tells.
        return found.results
    results = found.results
    votes = {}
    if config.eval.vote and split != "train" and not hide_images:
        votes = baselines(dataset, k, split)
        results["vote"] = {row: measure(r, dataset, split) for row, r in votes.items()}
    shown = model.layout.num_images and not hide_images
    name = "this run" + (", text and pictures" if shown else ", text")
    saved = f"{split}-{search}" + ("-without_images" if hide_images else "")
    rows = {**results.get("vote", {}), name: results["metrics"]}
    if "with_memory" in results:
        rows[name + MEMORY] = results["with_memory"]
    # By the name of the row: the key in the json, and in the name of the file.
    keys = {row: row.replace(", ", "_") for row in votes} | {name: "run", name + MEMORY: "memory"}
    searches = votes | {name + added: result for added, result in found.searches.items()}
    about = per_query_lib.About(dataset.name, dataset.content_hash, split, search)
    judged = {row: judge(result, dataset, split) for row, result in searches.items()}
    intervals = {row: bootstrap.intervals(all_of.queries) for row, all_of in judged.items()}
    results["intervals"] = {keys[row]: between for row, between in intervals.items()}
    results["groups"] = {keys[row]: all_of.groups for row, all_of in judged.items()}
    for row, judgement in judged.items():
        file = saved + ("" if row == name else f"-{keys[row]}") + per_query_lib.SUFFIX
        place = os.path.join(config.workdir, "evaluation", file)
        per_query_lib.save(place, judgement.queries, about)
    path = write_results(config.workdir, saved, results)
    print(report.format_table(rows))
    print(
        f"{dataset.name}, {split}: {results['counts']['queries']} queries, "
        f"{results['counts']['labels']} labels, {search} search; written to {path}"
    )
    if with_report:
        place = os.path.join(config.workdir, "evaluation", f"{saved}.report.html")
        page = page_lib.assemble(
            config.workdir,
            dataset,
            split,
            results=results,
            kept=found.searches[""],
            label_vectors=found.label_vectors.values,
            frequency=label_frequency(dataset),
            judged={row: judged[row] for row in searches if row not in votes},
            intervals=intervals,
            rows=rows,
            command=shlex.join(sys.orig_argv),
            versions=versions(),
            settings=config.to_json(),
        )
        whole.write_bytes(place, render.render(page).encode("utf-8"))
        print(f"report written to {place}")
    return results


def versions() -> dict[str, str]:
    """Of Python, of the packages that decide what comes out, and the kind of device."""
    found = {"python": platform.python_version()}
    for name in ("vixml_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "scann"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    devices = jax.devices()
    return found | {"device": f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})"}


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory that train wrote")
    memory.keep_freed_pages()
    processes.start(values.coordinator, values.num_processes, values.process_index)
    group = processes.world()
    if values.search == "scann" and not remote.is_local(values.workdir):
        raise InputError(
            f"--search=scann: an index is kept beside the run, and ScaNN writes no "
            f"{values.workdir}: copy the run to this machine first"
        )
    if values.search == "scann" and group.count > 1:
        raise InputError(
            "--search=scann: an index is built and searched by one process; leave out --coordinator"
        )
    if values.report and group.count > 1:
        raise InputError("--report: is made by one process; leave out --coordinator")
    programs.keep_in(values.compile_cache)
    remote.check(values.workdir, "workdir")
    config = runs.read_config(values.workdir, data=values.data, mesh=values.mesh)
    dataset = runs.open_dataset(config, values.data_cache)
    _check_tuning(values.tune_memory, dataset, config)
    mesh = runs.make_mesh(config)
    tower, layout = runs.read_tower(config.workdir)
    model = runs.build_model(config, tower, layout, dataset.num_labels, mesh)
    params, labels, step = runs.restore_model(config.workdir, model)
    chosen = (epath.Path(config.workdir) / runs.BEST / str(step)).is_dir()
    why = f", the best in {config.loop.choose_by} on valid" if chosen else ""
    print(f"{config.workdir}: checkpoint of step {step}{why}")
    results = show(
        config,
        model,
        params,
        labels,
        dataset,
        split=values.split,
        search=values.search,
        searched=config_lib.group_from_flags("search", SearchConfig, values),
        mixing=retrieval.as_told(config.eval, values, config.workdir, step),
        tune=values.tune_memory,
        hide_images=values.hide_images,
        with_report=values.report,
        group=group,
    )
    if values.tune_memory and not group.index:
        tried = results["tuning"]
        print(f"memory tuned on valid by {', '.join(values.tune_memory)}, of {len(tried)} tried:")
        for row in tried[:3]:
            print(f"  {row['value']:.2f}  {retrieval.describe(retrieval.mixing(row))}")
        path = retrieval.keep_tuned(config.workdir, step, values.tune_memory, tried)
        print(f"kept in {path}, which evaluate and predict follow from now on")


def _check_tuning(names: Sequence[str], dataset: PreparedDataset, config: Config) -> None:
    """Refuses a `--tune_memory` that the data do not allow, before anything is done."""
    if not names:
        return
    dataset.split("valid")
    known = metric_names(min(config.eval.k, dataset.num_labels))
    for name in names:
        if name not in known:
            raise InputError(f"--tune_memory={name}: expected some of {', '.join(known)}")


def define_flags() -> None:
    """The flags of this door; all else comes from the run directory."""
    flags.DEFINE_string("workdir", "", "Run directory that train wrote.")
    flags.DEFINE_string("data", "", "Prepared data, if it has moved since training.")
    flags.DEFINE_string(
        "mesh", "", "Mesh to judge on, if not as trained: fsdp:-1 fits any devices."
    )
    flags.DEFINE_enum("split", "test", ["test", "valid", "train"], "Which queries to judge on.")
    retrieval.define_flags()
    flags.DEFINE_list(
        "tune_memory",
        [],
        "Metrics, P@1,PSP@5 say, whose mean on the validation split first chooses how the labels "
        "of near training queries count; kept with the run.",
    )
    flags.DEFINE_boolean(
        "hide_images", False, "Judge queries by their texts alone: what their pictures bring."
    )
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "How labels are searched.")
    config_lib.define_group("search", SearchConfig)
    flags.DEFINE_boolean(
        "report", False, "Write evaluation/SPLIT-SEARCH.report.html, a page to look at, as well."
    )
    programs.define_flag()
    remote.define_flag()
    processes.define_flags()


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
