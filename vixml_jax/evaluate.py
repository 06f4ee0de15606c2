"""The door that judges a run: encode, search, measure, and write it all down."""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import config as config_lib
from vixml_jax import errors, memory, processes, programs, remote, runs
from vixml_jax.config import Config, EvalConfig
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
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.scann import ScannIndex
from vixml_jax.structs import LabelState, SearchResult, Share

MEMORY = ", memory"  # Added to the name of what was found with memory.


class Found(NamedTuple):
    """An evaluation: what is written of it, and what a report is made from.

    Attributes:
      results: Values of json.
      searches: What was found, filter pairs in it, by what is added to the name of the run.
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


def measure(result: SearchResult, dataset: PreparedDataset, split: str, k: int) -> dict[str, float]:
    """The metrics of search results, filter pairs taken out."""
    _, relevance, pairs = dataset.split(split)
    kept = index_lib.drop_filtered(result, pairs, k)
    return metrics_lib.compute_metrics(
        kept.ids, relevance, inverse_propensity(dataset), recall_ks=_recall_ks(k)
    )


def judge(result: SearchResult, dataset: PreparedDataset, split: str, k: int) -> Judgement:
    """All there is to say of search results: by query, by groups of labels and of queries."""
    queries, relevance, pairs = dataset.split(split)
    frequency = label_frequency(dataset)
    occurrences = np.bincount(relevance.indices, minlength=dataset.num_labels)
    return breakdown.judge(
        index_lib.drop_filtered(result, pairs, k).ids,
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
        recall_ks=_recall_ks(k),
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
    k: int,
    block: int,
    memory: EvalConfig | None = None,
    index_dir: str | None = None,
    titles: bool = True,
    group: Group = processes.ALONE,
) -> Found:
    """Metrics of a model on a split, with counts and seconds of each phase.

    Args:
      model, params, labels: What to judge.
      dataset: Prepared data of the run.
      split: 'test', 'valid' or 'train'.
      search: 'exact' or 'scann'.
      k: Labels kept of each query after filtering.
      block: Items encoded at a time.
      memory: Its `memory_...` flags, where the labels of near training queries shall count; the
        metrics with them stand under `with_memory`.
      index_dir: Where a ScaNN index is kept; needed for 'scann'.
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
    fetched = min(k + index_lib.over_fetch(pairs), dataset.num_labels)
    exact = ExactIndex(label_vectors, num_labels=dataset.num_labels, mesh=model.mesh)
    settings: dict[str, Any] = {"kind": search, "k": k, "fetched": fetched}
    if search == "scann":
        index = open_scann(label_vectors.values, index_dir)
        lap("build_index")
        result = index.search(query_vectors, fetched)
        lap("search")
        settings |= index.settings
        sample = np.random.default_rng(0).permutation(len(query_vectors))[:1000]
        truth = exact.search(query_vectors[sample], k)
        found = SearchResult(result.scores[sample], result.ids[sample])
        settings[f"recall@{k}"] = float(index_lib.recall_against(truth, found, min(k, fetched)))
        lap("recall")
    else:
        result = exact.search(query_vectors, fetched)
        lap("search")
        settings[f"recall@{k}"] = 1.0
    results = measure(result, dataset, split, k)
    lap("metrics")
    remembered, searches = {}, {"": result}
    if memory is not None:
        vectors = query_vectors if split == "train" else encode(dataset.train, "training queries")
        mixed = with_memory(
            result, query_vectors, vectors, dataset, memory, model, split == "train"
        )
        remembered = {"with_memory": measure(mixed, dataset, split, k)}
        searches[MEMORY] = mixed
        lap("memory")
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


def with_memory(
    result: SearchResult,
    queries: Float[np.ndarray, "q e"],
    vectors: Float[np.ndarray, "n e"],
    dataset: PreparedDataset,
    memory: EvalConfig,
    model: Model,
    same: bool,
) -> SearchResult:
    """The results, with the labels of near training queries; as many columns.

    Args:
      result: Labels of the queries.
      queries: Unit vectors of the queries,
      vectors: of the training queries.
      dataset: Whose training relevance is remembered.
      memory: How many training queries, and what they count.
      model: On whose mesh to search.
      same: Whether the queries are the training queries: none remembers itself.
    """
    itself = np.repeat(np.arange(len(queries))[:, None], 2, axis=1)[: len(queries) * same]
    k = min(memory.memory_k, len(vectors) - same)
    near = ExactIndex(vectors, mesh=model.mesh).search(queries, k + same)
    return augmented.mix_in_memory(
        result,
        index_lib.drop_filtered(near, itself, k),
        dataset.train_relevance,
        weight=memory.memory_weight,
        temperature=memory.memory_temperature,
        k=result.ids.shape[1],
    )


def open_scann(label_vectors: np.ndarray, directory: str) -> ScannIndex:
    """The index kept in `directory`, built there first if it is absent or of other vectors."""
    if os.path.isdir(directory):
        try:
            return ScannIndex.load(directory, label_vectors)
        except InputError as error:
            print(error)  # Says what it found, and that it is to be built anew.
    index = ScannIndex.build(label_vectors)
    index.save(directory)
    return index


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
    fetched = min(k + index_lib.over_fetch(dataset.split(split)[2]), dataset.num_labels)
    kinds = ["text"] + (["picture", "both"] if dataset.image_width else [])
    return {f"vote, {kind}": vote.vote(dataset, split=split, by=kind, k=fetched) for kind in kinds}


def show(
    config: Config,
    model: Model,
    params: Any,
    labels: LabelState,
    dataset: PreparedDataset,
    *,
    split: str,
    search: str,
    hide_images: bool = False,
    with_report: bool = False,
    group: Group = processes.ALONE,
) -> None:
    """Evaluates, writes the json and what each query adds, prints the table and where it lies.

    Args:
      config, model, params, labels, dataset, split, search, group: As of `search_model`.
      hide_images: Whether queries are judged by their texts alone.
      with_report: Whether to write the page, too; by one process alone.
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
        k=k,
        block=config.eval.block,
        memory=config.eval if config.eval.memory_weight else None,
        index_dir=os.path.join(config.workdir, "evaluation", "scann"),
        group=group,
    )
    if group.index:  # The first process tells.
        return
    results = found.results
    votes = {}
    if config.eval.vote and split != "train" and not hide_images:
        votes = baselines(dataset, k, split)
        results["vote"] = {row: measure(r, dataset, split, k) for row, r in votes.items()}
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
    judged = {row: judge(result, dataset, split, k) for row, result in searches.items()}
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
            kept=index_lib.drop_filtered(found.searches[""], dataset.split(split)[2], k),
            label_vectors=found.label_vectors.values,
            frequency=label_frequency(dataset),
            judged={row: judged[row] for row in searches if row not in votes},
            intervals=intervals,
            rows=rows,
            command=shlex.join(sys.orig_argv),
            versions=versions(),
            settings=config.to_json(),
        )
        report.write_bytes(place, render.render(page).encode("utf-8"))
        print(f"report written to {place}")


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
    config = config_lib.load(os.path.join(values.workdir, runs.CONFIG))
    config = dataclasses.replace(
        config,
        workdir=values.workdir,
        data=values.data or config.data,
        mesh=values.mesh or config.mesh,
    )
    if values.memory_weight is not None:
        judged = dataclasses.replace(config.eval, memory_weight=values.memory_weight)
        config = dataclasses.replace(config, eval=judged)
    dataset = runs.open_dataset(config, values.data_cache)
    mesh = runs.make_mesh(config)
    tower, layout = runs.read_tower(config.workdir)
    model = runs.build_model(config, tower, layout, dataset.num_labels, mesh)
    params, labels, step = runs.restore_model(config.workdir, model)
    chosen = (epath.Path(config.workdir) / runs.BEST / str(step)).is_dir()
    why = f", the best in {config.loop.choose_by} on valid" if chosen else ""
    print(f"{config.workdir}: checkpoint of step {step}{why}")
    show(
        config,
        model,
        params,
        labels,
        dataset,
        split=values.split,
        search=values.search,
        hide_images=values.hide_images,
        with_report=values.report,
        group=group,
    )


def define_flags() -> None:
    """The flags of this door; all else comes from the run directory."""
    flags.DEFINE_string("workdir", "", "Run directory that train wrote.")
    flags.DEFINE_string("data", "", "Prepared data, if it has moved since training.")
    flags.DEFINE_string(
        "mesh", "", "Mesh to judge on, if not as trained: fsdp:-1 fits any devices."
    )
    flags.DEFINE_enum("split", "test", ["test", "valid", "train"], "Which queries to judge on.")
    flags.DEFINE_float(
        "memory_weight", None, "What the labels of near training queries count, if not as trained."
    )
    flags.DEFINE_boolean(
        "hide_images", False, "Judge queries by their texts alone: what their pictures bring."
    )
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "How labels are searched.")
    flags.DEFINE_boolean(
        "report", False, "Write evaluation/SPLIT-SEARCH.report.html, a page to look at, as well."
    )
    programs.define_flag()
    remote.define_flag()
    processes.define_flags()


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
