"""Trains a model on prepared data and evaluates it; an interrupted run resumes where it stopped.

The first lines of a run show its data, model, devices, planned memory and run directory. `--plan`
prints the memory of large arrays and stops.
"""

import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from vixml_jax import command_line, errors, evaluate, evaluator, workdir
from vixml_jax import config as config_lib
from vixml_jax.augmentation import neighbours
from vixml_jax.config import Config
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.parallel import accelerators, distributed, sharding
from vixml_jax.runtime import compilation_cache, console, flag_fields, host_memory, tree_utils
from vixml_jax.serving import artifacts
from vixml_jax.storage import object_store
from vixml_jax.training import build, memory_planner, step_timer
from vixml_jax.training import train_state as state_lib
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.memory_planner import DataSizes, MemoryPlan
from vixml_jax.training.metric_logger import CollapseGuard, MetricLogger
from vixml_jax.training.preemption import StopSignal

COMMON_FLAGS = (
    "data",
    "workdir",
    "model.pretrained",
    "model.num_images",
    "lora.rank",
    "batch.size",
    "batch.row_width",
    "loop.epochs",
    "loop.eval_every",
    "loop.monitor",
    "optimizer.learning_rate",
    "knn.weight",
    "mesh",
    "seed",
    "plan",
)


def check_monitor(config: Config, dataset: PreparedDataset, k: int) -> None:
    """Checks that `--loop.monitor` can be computed on the data.

    Raises:
      InputError: If there is no validation split or no such metric.
    """
    monitor = config.loop.monitor
    if not monitor:
        return
    if not dataset.valid:
        raise InputError(
            f"--loop.monitor={monitor}: --data={config.data} has no validation split; prepare it "
            "again with one, such as --valid=0.02"
        )
    names = evaluator.metric_names(k)
    if monitor not in names:
        raise InputError(f"--loop.monitor={monitor}: expected one of {', '.join(names)}")


def describe_final_model(
    config: Config, position: trainer_lib.Position, steps_per_epoch: int
) -> str:
    """Returns a line that says which epoch the model of a finished run is from, and why."""
    epochs = config.loop.epochs
    if not position.epoch:
        return "final model: untrained (--loop.epochs=0)"
    if position.best_step is None:
        return f"final model: from the last epoch, {position.epoch}/{epochs}"
    best_epoch = position.best_step // steps_per_epoch
    text = (
        f"final model: from epoch {best_epoch}/{epochs}, the best in {config.loop.monitor} on "
        f"valid ({position.best:.2f})"
    )
    if position.epoch < epochs:
        text += (
            f"; training stopped after epoch {position.epoch}/{epochs} "
            f"(--loop.patience={config.loop.patience})"
        )
    return text


def show_setup(
    config: Config, dataset: PreparedDataset, parts: build.Parts, mesh: Mesh, rows: int
) -> None:
    """Prints a status line each about the data, the model and the devices.

    Args:
      config: Flags of the run.
      dataset: Its prepared data.
      parts: Its model and abstract state.
      mesh: Its devices.
      rows: Packed rows of a typical batch.
    """
    # From the description of the data, so that the test split is not touched.
    counts = {name: dataset.info.get(f"num_{name}", 0) for name in ("train", "valid", "test")}
    queries = [f"{count:,} {name}" for name, count in counts.items() if count]
    images = f"images of width {dataset.image_width}" if dataset.image_width else "no images"
    console.status(
        f"data: {dataset.name}, {', '.join(queries[:-1])} and {queries[-1]} queries, "
        f"{dataset.num_labels:,} labels, {images}"
    )
    tower = parts.model.tower.config
    family = next(name for name, kind in workdir.FAMILIES.items() if isinstance(tower, kind))
    trained, frozen = map(_num_values, workdir.split_params(parts.model.abstract_params, tower))
    prototypes = "label prototypes" if config.labels.prototypes else "no label prototypes"
    console.status(
        f"model: {family} {config.model.pretrained or 'from scratch'}, {tower.num_layers} layers x "
        f"{tower.width}, {trained:,} trained and {frozen:,} frozen parameters, {tower.dtype}, "
        f"{prototypes}"
    )
    console.status(
        f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {_spell(mesh)}, batches "
        f"of {config.batch.size:,} queries in about {rows:,} rows of {config.batch.row_width}"
    )


def _num_values(tree: object) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _spell(mesh: Mesh) -> str:
    return ",".join(f"{name}:{size}" for name, size in mesh.shape.items())


def _describe_memory(planned: MemoryPlan) -> str:
    capacity = f" of {planned.device / 2**30:.1f}" if planned.device else ""
    total = max(0.01, planned.total / 2**30)
    return f"memory: {total:.2f}{capacity} GiB per device planned"


def _show_arrays(parts: build.Parts, sizes: DataSizes, show: Callable[[str], None]) -> None:
    """Shows dimensions that are stored with padding, and a table of all large arrays."""
    tables = state_lib.abstract_tables(parts.model, sizes.queries)
    for line in sharding.describe_padding(
        {**parts.model.abstract_params, **tables}, parts.model.mesh
    ):
        show(line)
    show(memory_planner.array_table(parts.like))


def plan(
    config: Config, *, devices: str = "", sizes: str = "", data_cache: str = object_store.CACHE
) -> None:
    """Prints the memory that a run needs per device.

    Nothing is allocated on devices or written. Of a pretrained tower only its config.json is read.

    Args:
      config: Flags of the run.
      devices: TPU slice to plan for, such as "v5e:16x16", which need not exist here; empty: the
        devices of this machine.
      sizes: "queries:N,labels:N" in place of the sizes of the data. Items are then assumed to have
        the `--max_tokens` of the prepared data.
      data_cache: Local directory for copies of data from an object store.

    Raises:
      InputError: If the run does not fit, or there is no such slice.
    """
    mesh = workdir.make_mesh(config, memory_planner.slice_of(devices) if devices else None)
    with tempfile.TemporaryDirectory() as scratch:  # Built-in data are prepared here.
        dataset = workdir.open_dataset(dataclasses.replace(config, workdir=scratch), data_cache)
        check_monitor(config, dataset, min(config.eval.k, dataset.num_labels))
        tower, layout = build.make_tower(config, dataset)
        planned_sizes = DataSizes.parse(sizes, build.sizes_of(dataset))
        parts = build.assemble(config, tower, layout, planned_sizes, mesh)
        length = 2.0 * build.longest_item(layout, dataset)
        if not sizes:
            length = sum(map(parts.model.mean_length, (dataset.train, dataset.labels)))
        has_images = [side.images is not None for side in (dataset.train, dataset.labels)]
        batch, key = memory_planner.abstract_batch(
            parts.model, config.batch.size, length, has_images=has_images, width=dataset.image_width
        )
    rows, width = batch.items.tokens.shape
    kind = mesh.devices.flat[0].device_kind
    chip = accelerators.find(kind)
    published = ""
    if chip:
        published = f" ({chip.memory / 2**30:.0f} GiB, {chip.peak_flops / 1e12:.0f} TFLOP/s each)"
    print(
        f"plan: {mesh.size} x {kind}{published}, --mesh={_spell(mesh)}; {planned_sizes.queries} "
        f"queries, {planned_sizes.labels} labels; a batch of {config.batch.size} in {rows} rows of "
        f"{width}"
    )
    _show_arrays(parts, planned_sizes, print)
    start = time.perf_counter()
    planned = memory_planner.plan_memory(parts.like, lambda: parts.step.program(batch, key))
    planned.check()
    print(planned)
    print(f"compiled in {time.perf_counter() - start:.0f} s; the run fits")


def train(
    config: Config,
    stop: StopSignal | None = None,
    *,
    profile: tuple[int, int] | None = None,
    data_cache: str = object_store.CACHE,
) -> None:
    """Trains from the newest checkpoint of the run directory, or from the start, and evaluates.

    Evaluations use the validation split if the data have one, else the test split.

    Args:
      config: Flags of the run.
      stop: Tells whether a signal requested the run to stop; None: no signal is handled.
      profile: Window of steps to profile; see `step_timer.Profiler`.
      data_cache: Local directory for copies of data from an object store.
    """
    group = distributed.world()
    with distributed.first_process_first("data"):
        dataset = workdir.open_dataset(config, data_cache)
    k = min(config.eval.k, dataset.num_labels)
    check_monitor(config, dataset, k)
    mesh = workdir.make_mesh(config)
    tower, layout = build.make_tower(config, dataset)
    sizes = build.sizes_of(dataset)
    parts = build.assemble(config, tower, layout, sizes, mesh)
    model, tx, like, _ = parts
    with distributed.first_process_first("run directory"):
        shards = workdir.open_run(config, tower, layout, dataset.content_hash, mesh)
    steps_per_epoch = -(-len(dataset.train) // config.batch.size)
    total_steps = config.loop.epochs * steps_per_epoch
    checkpoints = Checkpoints(
        os.path.join(config.workdir, workdir.CHECKPOINTS),
        max_to_keep=config.loop.max_to_keep,
        every=config.loop.save_every,
        minutes=config.loop.save_minutes,
        best=os.path.join(config.workdir, workdir.BEST) if config.loop.monitor else None,
    )
    split = "valid" if dataset.valid else "test"
    trainer = trainer_lib.Trainer(
        model,
        dataset,
        parts.step,
        batch=config.batch,
        labels=config.labels,
        loop=config.loop,
        block=config.eval.block,
        seed=config.seed,
        shards=shards,
        group=group,
        checkpoints=checkpoints,
        guard=CollapseGuard(margin=config.loss.margin_min, num_negatives=config.loss.num_negatives),
        evaluate=lambda params, labels: evaluator.evaluate_model(
            model,
            params,
            labels,
            dataset,
            split=split,
            k=k,
            block=config.eval.block,
            titles=False,
            group=group,
        )["metrics"],
        split=split,
        stop=stop or StopSignal(),
    )
    show_setup(config, dataset, parts, mesh, trainer.batch_rows)
    _show_arrays(parts, sizes, console.detail)
    planned = trainer.plan(like)
    planned.check()
    console.status(_describe_memory(planned))
    console.detail(str(planned))
    console.detail(checkpoints.check_disk_space(like))
    resumed_at = checkpoints.latest_step()
    console.status(
        f"output: {object_store.absolute(config.workdir)}, "
        + ("new run" if resumed_at is None else f"resumed at step {resumed_at} of {total_steps}")
    )

    params = build.initial_params(config, model, dataset)
    if resumed_at is None:
        params, labels, bank = state_lib.initial_labels(
            model,
            params,
            dataset,
            labels=config.labels,
            block=config.eval.block,
            seed=config.seed,
            group=group,
        )
    else:
        labels = model.table.init_state(np.zeros(dataset.num_labels, np.int32))
        bank = state_lib.empty_bank(model, len(dataset.train))
    params, frozen = workdir.split_params(params, tower)
    workdir.save_frozen(config.workdir, frozen)
    state = state_lib.place_state(like, params, frozen, tx, labels, bank)
    del params, frozen, bank, labels
    clusters, position = trainer.start()
    if resumed_at is not None:
        state, clusters, position = checkpoints.restore(state, clusters)
        position = trainer_lib.Position(**position)
    logger = MetricLogger(
        config.workdir,
        step=int(state.step),
        total_steps=total_steps,
        num_epochs=config.loop.epochs,
        learning_rates=build.learning_rates(config, total_steps),
        flags=flag_fields.lines(config),
        peak_flops=accelerators.peak_flops(mesh.devices.flat),
        profile=profile,
    )
    try:
        state, position = trainer.run(state, clusters, position, logger)
    except OSError as error:
        fault = errors.disk_fault(error)
        if fault is None:
            raise
        raise InputError(
            f"--workdir={config.workdir}: {fault} while training; checkpoints are kept: free disk "
            "space and run the same command again"
        ) from None
    finally:
        logger.close()
        checkpoints.close()
    if logger.timer.summary():
        console.status(logger.timer.summary())

    params, labels = tree_utils.merge(state.params, state.frozen), state.labels
    last_step = int(state.step)
    if position.best_step is not None:
        # A device may not have memory for two models and an optimizer.
        del state, params, labels
        params, labels, last_step = workdir.restore_model(config.workdir, model)
    console.status(describe_final_model(config, position, steps_per_epoch))
    # In other cases `predict` computes the serving artifacts when it first needs them.
    serves = group.count == 1 and object_store.is_local(config.workdir)
    serving = os.path.join(config.workdir, artifacts.DIRECTORY)
    evaluate.show(
        config,
        model,
        params,
        labels,
        dataset,
        split=split,
        search="exact",
        mixing=neighbours.as_trained(config.knn),
        save=functools.partial(artifacts.save, serving, dataset, last_step) if serves else None,
        group=group,
    )
    if split == "valid":
        console.status(
            "to evaluate on the test split: python -m vixml_jax.evaluate "
            f"--workdir={config.workdir}"
        )
    written = ["config.json (flags)", "checkpoints/ (model and training state)"]
    written += ["best/ (the best model)"] if config.loop.monitor else []
    written += ["metrics.jsonl and tensorboard/ (training curves)", "evaluation/ (results)"]
    written += [f"{artifacts.DIRECTORY}/ (label vectors for predict)"] if serves else []
    console.status(f"written to {object_store.absolute(config.workdir)}: {', '.join(written)}")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    values = flags.FLAGS
    config = config_lib.from_flags(values)
    if not values.plan and (values.plan_devices or values.plan_size):
        raise InputError("--plan_devices and --plan_size have no effect without --plan: add --plan")
    profile = step_timer.parse_window(values.profile_steps)
    host_memory.keep_freed_pages()
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    # JAX can write programs for absent devices to the cache, but cannot read them back.
    compilation_cache.enable("" if values.plan_devices else values.compile_cache)
    if values.plan:
        plan(
            config,
            devices=values.plan_devices,
            sizes=values.plan_size,
            data_cache=values.data_cache,
        )
    else:
        with StopSignal().installed() as stop:
            train(config, stop, profile=profile, data_cache=values.data_cache)


def define_flags() -> None:
    """Defines the flags of a run, and those that may differ each time it is started."""
    config_lib.define_flags()
    flags.DEFINE_boolean(
        "plan",
        False,
        "Print the memory of large arrays per device, and stop. Nothing is allocated; the training "
        "step is compiled. The status is 2 if the run does not fit.",
    )
    flags.DEFINE_string(
        "plan_devices",
        "",
        "TPU slice to plan for, such as v5e:16x16; it need not exist. Empty: the devices of this "
        "machine.",
    )
    flags.DEFINE_string(
        "plan_size",
        "",
        "Size of the data to plan for, such as queries:2000000,labels:10000000. Empty: the size of "
        "--data.",
    )
    flags.DEFINE_string(
        "profile_steps",
        "",
        "Steps to profile, START:END: those after START up to END. The profile is written to the "
        "run directory.",
    )
    compilation_cache.define_flag()
    object_store.define_flag()
    distributed.define_flags()


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
