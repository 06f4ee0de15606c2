"""Evaluates a run on a split: searches labels, prints metrics, writes JSON and an HTML report."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from vixml_jax import command_line, evaluator, saved_model
from vixml_jax import config as config_lib
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.config import Config, SearchConfig
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap
from vixml_jax.evaluation import per_query as per_query_lib
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed
from vixml_jax.parallel.distributed import Group
from vixml_jax.report import tables
from vixml_jax.runtime import compilation_cache, console, host_memory
from vixml_jax.search import factory
from vixml_jax.serving import artifacts, label_updates
from vixml_jax.storage import atomic, json_files, object_store
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import LabelState

COMMON_FLAGS = (
    "workdir",
    "split",
    "report",
    "report_images",
    "search",
    "search.recall",
    "tune",
    "fusion.prototypes",
    "fusion.head",
    "fusion.frequency",
    "knn.weight",
    "drop_images",
    "data",
    "other_data",
    "mesh",
)


def write_results(workdir: str, name: str, results: dict[str, Any]) -> str:
    """Writes evaluation/NAME.json of a run, metrics at its top level; returns the path."""
    path = os.path.join(workdir, "evaluation", f"{name}.json")
    flat = {**results["metrics"], **{k: v for k, v in results.items() if k != "metrics"}}
    json_files.write(path, flat)
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
    step: int,
    search_config: SearchConfig = config_lib.SEARCH,
    scoring: Scoring = settings_lib.COSINES,
    tune: Sequence[str] = (),
    drop_images: bool = False,
    vectors: VectorStore | None = None,
    save: evaluator.SaveVectors | None = None,
    with_report: bool = False,
    images: str = "",
    group: Group = distributed.ALONE,
    is_other_data: bool = False,
    decide_neighbours: bool = False,
) -> dict[str, Any]:
    """Evaluates a model, writes the results and prints a table of the metrics.

    Written to evaluation/ of the run directory: a JSON file, one npz file of metrics per query for
    each row of the table, and the report if asked for. With several processes, the first one writes
    and prints.

    Args:
      config: Configuration of the run.
      model, params, labels, dataset, split, search, search_config, scoring, tune, vectors, save,
        group: As in `evaluator.search_model`.
      step: Of the model. Tuned settings are saved in the run directory for it.
      drop_images: Whether to evaluate queries by their texts only.
      with_report: Whether to write the HTML report too; only with a single process.
      images: Table with the image files of the queries, for the report; empty: none.
      is_other_data: Whether the data are others than the run was trained on. Their results then
        have names of their own.
      decide_neighbours: Whether training neighbours that lower the metrics are turned off for later
        commands.

    Returns:
      The results as written; in all processes but the first, those of `evaluator.search_model`.
    """
    if drop_images:
        dataset, vectors = evaluator.without_images(dataset, split), None
    k = min(config.eval.k, dataset.num_labels)
    evaluation = evaluator.search_model(
        model,
        params,
        labels,
        dataset,
        split=split,
        search=search,
        search_config=search_config,
        k=k,
        block=config.eval.block,
        scoring=scoring,
        tune=tune,
        index_dir=os.path.join(config.workdir, "evaluation", "scann"),
        vectors=vectors,
        save=save,
        group=group,
    )
    results = evaluation.results
    if group.index:
        return results
    if tune:
        _save_tuned(config.workdir, step, tune, results["tuning"])
    baselines = {}
    if config.eval.knn_baseline and split != "train" and not drop_images:
        baselines = evaluator.baselines(dataset, k, split)
        results["knn_baseline"] = {
            row: evaluator.measure(result, dataset, split) for row, result in baselines.items()
        }
    uses_images = model.layout.num_images and not drop_images
    name = "this run" + (", text and images" if uses_images else ", text")
    saved = f"{split}-{search}" + ("-without_images" if drop_images else "")
    saved += f"-data_{dataset.content_hash[:8]}" if is_other_data else ""
    saved += f"-width_{search_config.width}" if search_config.width else ""
    saved += f"-{search_config.dtype}" if search_config.dtype != "float32" else ""
    rows = {**results.get("knn_baseline", {}), name: results["metrics"]}
    if "with_neighbours" in results:
        rows[name + evaluator.NEIGHBOURS] = results["with_neighbours"]
    # Row name -> key in the JSON file and in file names.
    keys = {row: row.replace("kNN baseline, ", "knn_") for row in baselines}
    keys |= {name: "run", name + evaluator.NEIGHBOURS: "neighbours"}
    searches = baselines | {name + suffix: result for suffix, result in evaluation.searches.items()}
    ids = dataset.info["arrays"][f"{split}_ids"]["sha256"]
    about = per_query_lib.About(dataset.name, dataset.content_hash, split, search, ids)
    sliced = {
        row: evaluator.slice_metrics(result, dataset, split) for row, result in searches.items()
    }
    intervals = {row: bootstrap.intervals(metrics.queries) for row, metrics in sliced.items()}
    results["intervals"] = {keys[row]: bounds for row, bounds in intervals.items()}
    results["groups"] = {keys[row]: metrics.groups for row, metrics in sliced.items()}
    directory = os.path.join(config.workdir, "evaluation")
    for row, metrics in sliced.items():
        file = saved + ("" if row == name else f"-{keys[row]}") + per_query_lib.SUFFIX
        per_query_lib.save(os.path.join(directory, file), metrics.queries, about)
    path = write_results(config.workdir, saved, results)
    print(tables.format_table(rows))
    console.status(f"{_describe(dataset, split, results)}, {search} search; written to {path}")
    if "with_neighbours" in results and not tune:
        _compare_neighbours(config.workdir, step, scoring, results, split, decide_neighbours)
    if with_report:
        from vixml_jax.report import page as page_lib
        from vixml_jax.report import render

        served = evaluator.NEIGHBOURS if "with_neighbours" in results else ""  # By predict.
        page = page_lib.assemble(
            config.workdir,
            dataset,
            split,
            run=name + served,
            results=results,
            result=evaluation.searches[served],
            label_vectors=evaluation.label_vectors.values,
            frequency=evaluator.label_frequency(dataset),
            sliced={row: metrics for row, metrics in sliced.items() if row not in baselines},
            intervals=intervals,
            rows=rows,
            command=shlex.join(sys.orig_argv),
            versions=versions(),
            settings=config.to_json(),
            images=images,
        )
        path = os.path.join(directory, f"{saved}.report.html")
        atomic.write_bytes(path, render.render(page).encode("utf-8"))
        console.status(f"report written to {path}")
    return results


def versions() -> dict[str, str]:
    """Returns versions of Python and of the libraries that affect results, and the devices."""
    versions = {"python": platform.python_version()}
    for name in ("vixml_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "scann"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})"
    return versions | {"device": device}


def main(argv: Sequence[str]) -> None:
    """Evaluates the run that the flags name."""
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory written by train")
    host_memory.bound_freed_pages()
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    group = distributed.world()
    _check_flags(values, group)
    compilation_cache.enable(values.compile_cache)
    object_store.check(values.workdir, "workdir")
    config = workdir_lib.read_config(values.workdir, data=values.data, mesh=values.mesh)
    dataset = workdir_lib.open_run_dataset(
        config,
        values.data_cache,
        allow_other=values.other_data,
        hint="; --other_data evaluates on them all the same",
    )
    is_other_data = dataset.content_hash != workdir_lib.content_hash(config.workdir)
    if is_other_data:
        _check_other_data(config.workdir, dataset, values.tune)
    _check_tuning(values.tune, dataset, config)
    mesh = workdir_lib.make_mesh(config)
    tower, layout = workdir_lib.read_tower(config.workdir)
    search_config = config_lib.group_from_flags("search", SearchConfig, values)
    factory.check(values.search, search_config, config, tower.width)
    model = workdir_lib.build_model(config, tower, layout, dataset.num_labels, mesh)
    with saved_model.opened(config.workdir) as saved:
        params, labels = saved.restore(model)
    step = saved.step
    selected = f", the best in {config.loop.monitor} on valid" if saved.is_best else ""
    console.status(f"{config.workdir}: checkpoint of step {step}{selected}")
    if object_store.is_local(config.workdir) and label_updates.steps(config.workdir):
        print(
            "note: labels that predict added or removed are ignored; the run is evaluated on the "
            "labels of the prepared data"
        )
    show(
        config,
        model,
        params,
        labels,
        dataset,
        split=values.split,
        search=values.search,
        search_config=search_config,
        step=step,
        vectors=None
        if is_other_data  # Those of the run's data are kept.
        else VectorStore(
            config.workdir,
            saved.vectors_step,
            dataset.content_hash,
            num_processes=group.count,
        ),
        scoring=settings_lib.from_flags(config, values, config.workdir, step),
        tune=values.tune,
        drop_images=values.drop_images,
        with_report=values.report,
        images=values.report_images,
        group=group,
        is_other_data=is_other_data,
    )


def _describe(dataset: PreparedDataset, split: str, results: dict[str, Any]) -> str:
    """What was evaluated: sizes, queries without labels, and the constants of PSP."""
    counts = results["counts"]
    text = f"{dataset.name}, {split}: {counts['queries']:,} queries, "
    if unlabelled := counts["queries_without_labels"]:
        possible = 100.0 * (1.0 - unlabelled / counts["queries"])
        text += (
            f"{unlabelled:,} of them without labels, which count as misses (P@1 is at most "
            f"{possible:.2f}), "
        )
    constants = f"PSP with A {dataset.propensity_a:g}, B {dataset.propensity_b:g}"
    return f"{text}{counts['labels']:,} labels, {constants}"


def _compare_neighbours(
    workdir: str, step: int, scoring: Scoring, results: dict[str, Any], split: str, decide: bool
) -> None:
    """Tells if training neighbours lower the metrics; turns them off for later commands if asked.

    Settings that were tuned for this step stay as they are.

    Args:
      workdir, step, scoring: The run, its model, and how labels were scored.
      results: Of the evaluation with and without neighbours.
      split: That was evaluated.
      decide: Whether to turn them off.
    """
    name = max((n for n in results["metrics"] if n.startswith("P@")), key=lambda n: int(n[2:]))
    alone, mixed = results["metrics"][name], results["with_neighbours"][name]
    if mixed >= alone:
        return
    digits = 1 if f"{alone:.1f}" != f"{mixed:.1f}" else 4
    change = f"from {alone:.{digits}f} to {mixed:.{digits}f}"
    found = f"neighbours lower {name} {change} on the {split} split"
    if not decide or settings_lib.is_tuned(workdir, step):
        print(f"{found}: --knn.weight=0 turns them off")
        return
    rows = [
        settings_lib.to_row(scoring.without_neighbours(), alone),
        settings_lib.to_row(scoring, mixed),
    ]
    settings_lib.save_tuned(workdir, step, [name], rows)
    print(
        f"{found}: off in later calls of evaluate and predict; "
        f"--knn.weight={scoring.mixing.weight:g} turns them on"
    )


def _check_other_data(workdir: str, dataset: PreparedDataset, tune: Sequence[str]) -> None:
    """Checks that data that a run was not trained on have its labels and its tokenizer.

    Raises:
      InputError: If they do not, or this cannot be found out, or the run would be tuned on them.
    """
    if tune:
        raise InputError("--tune: cannot be combined with --other_data; tune on the run's own data")
    path = artifacts.locate(workdir)
    if not artifacts.has_labels_of(path, dataset):
        raise InputError(
            f"--data={dataset.path}: its labels or its tokenizer are not those in {path}; expected "
            f"the labels of the run, in the same order, and data prepared with --tokenizer={path}"
        )
    print(
        f"note: {dataset.path} is not what the run was trained on: its queries may have been "
        "training queries, and neighbours and PSP are those of its own training split"
    )


def _save_tuned(workdir: str, step: int, names: Sequence[str], tried: list[dict[str, Any]]) -> None:
    """Saves the result of tuning in the run directory, and prints the best scorings."""
    what = "fusion and training neighbours" if "head" in tried[0] else "training neighbours"
    print(f"{what} tuned on the validation split by {', '.join(names)}; {len(tried)} settings:")
    for row in tried[:3]:
        described = settings_lib.describe(settings_lib.from_row(row)) or "--knn.weight=0"
        print(f"  {row['value']:.2f}  {described}")
    used, metric = tried[0], names[0] if len(names) == 1 else f"the mean of {', '.join(names)}"
    others = [row for row in tried if row["value"] > used["value"]]
    if others:
        print(
            f"the first is used: the others do not raise {metric} beyond chance, from "
            f"{used['value']:.2f} to {max(row['value'] for row in others):.2f} at best"
        )
    if not used["weight"] and any(row["weight"] for row in tried):
        print("training neighbours are off")
    path = settings_lib.save_tuned(workdir, step, names, tried)
    console.status(f"written to {path}; evaluate and predict use the best from now on")


def _check_flags(values: flags.FlagValues, group: Group) -> None:
    """Raises an InputError for flags that cannot be combined."""
    if values.search == "scann" and not object_store.is_local(values.workdir):
        raise InputError(
            f"--search=scann: ScaNN writes its index to the run directory, and cannot write to "
            f"{values.workdir}; copy the run to this machine first"
        )
    if group.count > 1 and (values.search == "scann" or values.report):
        flag = "report" if values.report else "search=scann"
        raise InputError(f"--{flag}: works with one process only; leave out --coordinator")
    if group.count > 1 and values["search.dtype"].value != "float32":
        raise InputError(
            f"--search.dtype={values['search.dtype'].value}: works with one process only; leave "
            "out --coordinator"
        )
    if values.report_images and not values.report:
        raise InputError(f"--report_images={values.report_images}: add --report")
    if values.report_images and not os.path.isfile(values.report_images):
        raise InputError(f"--report_images={values.report_images}: no such file")


def _check_tuning(names: Sequence[str], dataset: PreparedDataset, config: Config) -> None:
    """Raises an InputError if `--tune` names unknown metrics or there is no validation split."""
    if not names:
        return
    dataset.split("valid")
    evaluator.check_metric_names("tune", names, min(config.eval.k, dataset.num_labels))


def define_flags() -> None:
    """Defines the flags of this command; the rest of the configuration is that of the run."""
    flags.DEFINE_string("workdir", "", "Run directory written by train.")
    flags.DEFINE_string("data", "", "Prepared data of the run, if moved since training.")
    flags.DEFINE_boolean(
        "other_data",
        False,
        "Evaluate on other data than the run was trained on. They must have the same labels and "
        "tokenizer. The results get names of their own, SPLIT-SEARCH-data_HASH.",
    )
    flags.DEFINE_string(
        "mesh",
        "",
        "Device mesh; empty: as in training. fsdp:-1 fits any number of devices.",
    )
    flags.DEFINE_enum("split", "test", ["test", "valid", "train"], "Split to evaluate.")
    settings_lib.define_flags()
    flags.DEFINE_list(
        "tune",
        [],
        "Tune --fusion.* and --knn.* by these metrics on the validation split. For example "
        "--tune=P@1,PSP@5 takes the mean of both. The best settings are saved in the run directory "
        "and used by later calls of evaluate and predict.",
    )
    flags.DEFINE_boolean(
        "drop_images",
        False,
        "Evaluate queries by their texts only. Compared with the usual evaluation, this shows what "
        "their images contribute.",
    )
    flags.DEFINE_enum(
        "search",
        "exact",
        ["exact", "scann"],
        "Exact search, or ScaNN (approximate). ScaNN is tuned to reach --search.recall.",
    )
    config_lib.define_group("search", SearchConfig)
    flags.DEFINE_boolean(
        "report",
        False,
        "Also write an HTML report. It is evaluation/SPLIT-SEARCH.report.html of the run "
        "directory.",
    )
    flags.DEFINE_string(
        "report_images",
        "",
        "Table with the queries' image files, for the report. For example the CSV or JSONL file "
        "that the data were prepared from: the report shows images of the best and worst queries.",
    )
    compilation_cache.define_flag()
    object_store.define_flag()
    distributed.define_flags()


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
