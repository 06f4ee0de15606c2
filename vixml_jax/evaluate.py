"""The door that judges a run: encode, search, measure, and write it all down."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from vixml_jax import config as config_lib
from vixml_jax import errors, evaluator
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import neighbors
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.config import Config, SearchConfig
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap
from vixml_jax.evaluation import per_query as per_query_lib
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed
from vixml_jax.parallel.distributed import Group
from vixml_jax.report import page as page_lib
from vixml_jax.report import render, tables
from vixml_jax.runtime import compilation_cache, host_memory
from vixml_jax.serving import label_updates
from vixml_jax.storage import atomic, object_store
from vixml_jax.structs import LabelState


def write_results(workdir: str, name: str, results: dict[str, Any]) -> str:
    """Writes the contract's json, metrics at its top level; returns its path."""
    path = os.path.join(workdir, "evaluation", f"{name}.json")
    flat = {**results["metrics"], **{k: v for k, v in results.items() if k != "metrics"}}
    tables.write_json(path, flat)
    return path


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
    keep: evaluator.Keep | None = None,
    with_report: bool = False,
    pictures: str = "",
    group: Group = distributed.ALONE,
) -> dict[str, Any]:
    """Evaluates, writes the json and what each query adds, prints the table and where it lies.

    Args:
      config, model, params, labels, dataset, split, search, searched, mixing, tune, keep, group: As
        of `search_model`.
      hide_images: Whether queries are judged by their texts alone.
      with_report: Whether to write the page, too; by one process alone.
      pictures: A table that names the pictures of the queries, for the page; empty: none.

    Returns:
      What is written.
    """
    if hide_images:
        dataset = evaluator.without_images(dataset, split)
    k = min(config.eval.k, dataset.num_labels)
    found = evaluator.search_model(
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
        votes = evaluator.baselines(dataset, k, split)
        results["vote"] = {row: evaluator.measure(r, dataset, split) for row, r in votes.items()}
    shown = model.layout.num_images and not hide_images
    name = "this run" + (", text and pictures" if shown else ", text")
    saved = f"{split}-{search}" + ("-without_images" if hide_images else "")
    rows = {**results.get("vote", {}), name: results["metrics"]}
    if "with_memory" in results:
        rows[name + evaluator.MEMORY] = results["with_memory"]
    # By the name of the row: the key in the json, and in the name of the file.
    keys = {row: row.replace(", ", "_") for row in votes}
    keys |= {name: "run", name + evaluator.MEMORY: "memory"}
    searches = votes | {name + added: result for added, result in found.searches.items()}
    about = per_query_lib.About(dataset.name, dataset.content_hash, split, search)
    judged = {row: evaluator.judge(result, dataset, split) for row, result in searches.items()}
    intervals = {row: bootstrap.intervals(all_of.queries) for row, all_of in judged.items()}
    results["intervals"] = {keys[row]: between for row, between in intervals.items()}
    results["groups"] = {keys[row]: all_of.groups for row, all_of in judged.items()}
    for row, judgement in judged.items():
        file = saved + ("" if row == name else f"-{keys[row]}") + per_query_lib.SUFFIX
        place = os.path.join(config.workdir, "evaluation", file)
        per_query_lib.save(place, judgement.queries, about)
    path = write_results(config.workdir, saved, results)
    print(tables.format_table(rows))
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
            frequency=evaluator.label_frequency(dataset),
            judged={row: judged[row] for row in searches if row not in votes},
            intervals=intervals,
            rows=rows,
            command=shlex.join(sys.orig_argv),
            versions=versions(),
            settings=config.to_json(),
            pictures=pictures,
        )
        atomic.write_bytes(place, render.render(page).encode("utf-8"))
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
    host_memory.keep_freed_pages()
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    group = distributed.world()
    if values.search == "scann" and not object_store.is_local(values.workdir):
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
    if values.report_pictures and not (values.report and os.path.isfile(values.report_pictures)):
        what = "no such file" if values.report else "is for the report; say --report, too"
        raise InputError(f"--report_pictures={values.report_pictures}: {what}")
    compilation_cache.keep_in(values.compile_cache)
    object_store.check(values.workdir, "workdir")
    config = workdir_lib.read_config(values.workdir, data=values.data, mesh=values.mesh)
    dataset = workdir_lib.open_dataset(config, values.data_cache)
    _check_tuning(values.tune_memory, dataset, config)
    mesh = workdir_lib.make_mesh(config)
    tower, layout = workdir_lib.read_tower(config.workdir)
    model = workdir_lib.build_model(config, tower, layout, dataset.num_labels, mesh)
    params, labels, step = workdir_lib.restore_model(config.workdir, model)
    chosen = (epath.Path(config.workdir) / workdir_lib.BEST / str(step)).is_dir()
    why = f", the best in {config.loop.choose_by} on valid" if chosen else ""
    print(f"{config.workdir}: checkpoint of step {step}{why}")
    if object_store.is_local(config.workdir) and label_updates.steps(config.workdir):
        print(
            "judged with the labels of its data: not those that predict added, and all it removed"
        )
    results = show(
        config,
        model,
        params,
        labels,
        dataset,
        split=values.split,
        search=values.search,
        searched=config_lib.group_from_flags("search", SearchConfig, values),
        mixing=neighbors.as_told(config.eval, values, config.workdir, step),
        tune=values.tune_memory,
        hide_images=values.hide_images,
        with_report=values.report,
        pictures=values.report_pictures,
        group=group,
    )
    if values.tune_memory and not group.index:
        tried = results["tuning"]
        print(f"memory tuned on valid by {', '.join(values.tune_memory)}, of {len(tried)} tried:")
        for row in tried[:3]:
            print(f"  {row['value']:.2f}  {neighbors.describe(neighbors.mixing(row))}")
        path = neighbors.keep_tuned(config.workdir, step, values.tune_memory, tried)
        print(f"kept in {path}, which evaluate and predict follow from now on")


def _check_tuning(names: Sequence[str], dataset: PreparedDataset, config: Config) -> None:
    """Refuses a `--tune_memory` that the data do not allow, before anything is done."""
    if not names:
        return
    dataset.split("valid")
    known = evaluator.metric_names(min(config.eval.k, dataset.num_labels))
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
    neighbors.define_flags()
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
    flags.DEFINE_string(
        "report_pictures",
        "",
        "Table that names the pictures of the queries by their ids, shop.csv say: the report shows "
        "those of its best and worst queries.",
    )
    compilation_cache.define_flag()
    object_store.define_flag()
    distributed.define_flags()


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
