"""Trains a model on prepared data and evaluates it; an interrupted run resumes where it stopped.

The first lines of a run show its data, model, devices, planned memory and run directory. `--plan`
prints the memory of large arrays and stops.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from vixml_jax import command_line, errors, evaluate, evaluator, saved_model, workdir
from vixml_jax import config as config_lib
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.config import Config
from vixml_jax.data import preprocessing
from vixml_jax.data.on_demand import NotPreparedError
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.parallel import absent_devices, accelerators, distributed
from vixml_jax.runtime import (
    compilation_cache,
    console,
    determinism,
    flag_fields,
    host_memory,
    tree_utils,
)
from vixml_jax.serving import artifacts
from vixml_jax.storage import locks, object_store
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.training import (
    build,
    checks,
    describe,
    flops,
    head_trainer,
    initial_state,
    memory_planner,
    step_timer,
)
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.checkpoints import Checkpoints, nbytes
from vixml_jax.training.describe import final_model as describe_final_model
from vixml_jax.training.epoch_loop import Position
from vixml_jax.training.metric_logger import CollapseGuard, MetricLogger
from vixml_jax.training.planning import plan as planning
from vixml_jax.training.preemption import StopSignal

COMMON_FLAGS = (
    "data",
    "workdir",
    "model.pretrained",
    "model.num_images",
    "lora.rank",
    "batch.size",
    "loop.epochs",
    "loop.eval_every",
    "loop.monitor",
    "optimizer.learning_rate",
    "loss.kind",
    "head.only",
    "head.weight",
    "head.refit",
    "eval.tune",
    "knn.weight",
    "mesh",
    "seed",
    "plan",
)


def _open_data(config: Config, cache: str) -> PreparedDataset:
    """Opens the data of a run; see `workdir.open_dataset`.

    Raises:
      InputError: If there are none. For public data it says how to get them, and how long training
        takes.
    """
    try:
        return workdir.open_dataset(config, cache)
    except NotPreparedError as error:
        about = flops.describe_hours(config, error.dataset.train, error.dataset.max_tokens)
        raise InputError(f"{error}; {about}" if about else str(error)) from None


def plan(
    config: Config, *, devices: str = "", sizes: str = "", data_cache: str = object_store.CACHE
) -> None:
    """Prints the memory that a run needs per device, and the work and least time of its programs.

    Nothing is allocated on devices or written. Of a pretrained tower only its config.json is read.

    Args:
      config: Flags of the run.
      devices: Devices to plan for, such as "v5e:16x16" or "h100:8", which need not exist here;
        empty: the devices of this machine.
      sizes: "queries:N,labels:N" in place of the sizes of the data. Items are then assumed to have
        the `--max_tokens` of the prepared data.
      data_cache: Local directory for copies of data from an object store.

    Raises:
      InputError: If the run does not fit, or there are no such devices.
    """
    mesh = workdir.make_mesh(config, absent_devices.find(devices) if devices else None)
    with tempfile.TemporaryDirectory() as scratch:  # Built-in data are prepared here.
        dataset = _open_data(dataclasses.replace(config, workdir=scratch), data_cache)
        planning.show(config, dataset, mesh, sizes)


def _tower_trainer(
    config: Config,
    parts: build.Parts,
    dataset: PreparedDataset,
    split: str,
    group: distributed.Group,
    common: Mapping[str, Any],
) -> trainer_lib.Trainer | None:
    """Returns what runs the epochs of the whole model; None: there are none.

    Args:
      config: Flags of the run.
      parts: Its model and steps.
      dataset: Its prepared data.
      split: Split of evaluations in training.
      group: The processes of the run.
      common: Arguments of this trainer and that of the head.
    """
    if config.head.only:
        return None
    triplet = config.loss.kind == "triplet"
    return trainer_lib.Trainer(
        parts.model,
        dataset,
        parts.step,
        batch=config.batch,
        labels=config.labels,
        group=group,
        guard=CollapseGuard(
            margin=config.loss.margin_min if triplet else None,
            num_negatives=config.loss.num_negatives,
            warmup_steps=config.optimizer.warmup_steps,
        ),
        evaluate=lambda params, labels: evaluator.evaluate_model(
            parts.model,
            params,
            labels,
            dataset,
            split=split,
            k=min(config.eval.k, dataset.num_labels),
            block=config.eval.block,
            scoring=settings_lib.as_trained(config).without_neighbours(),
            titles=False,
            group=group,
        )["metrics"],
        split=split,
        joint=config.head.weight > 0,
        widths=config.loss.widths,
        later_steps=build.head_steps(config, len(dataset.train)),
        **common,
    )


def _head_trainer(
    config: Config, parts: build.Parts, dataset: PreparedDataset, common: Mapping[str, Any]
) -> head_trainer.HeadTrainer | None:
    """Returns what runs the epochs of the head alone, with arguments as above; None: no epochs."""
    if parts.head is None:
        return None
    return head_trainer.HeadTrainer(
        parts.model,
        dataset,
        parts.head.step,
        parts.head.optimizer,
        parts.head.like,
        head=config.head,
        first_epoch=0 if config.head.only else config.loop.epochs,
        **common,
    )


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
    started_at, stop = time.monotonic(), stop or StopSignal()
    group = distributed.world()
    with stop.unwinding(), distributed.first_process_first("data"):
        dataset = _open_data(config, data_cache)
    if config.data != preprocessing.GLYPHS and object_store.is_local(config.data):
        config = dataclasses.replace(config, data=dataset.path)  # Of a source: in the cache.
    checks.check_tokenizer(config, dataset)
    given, config = config, checks.with_metrics(config, dataset)
    mesh = workdir.make_mesh(config)
    tower, layout = build.make_tower(config, dataset)
    sizes = build.sizes_of(dataset)
    config = build.fit_batch(workdir.with_head_loss(config, *sizes.density), sizes)
    parts = build.assemble(config, tower, layout, sizes, mesh)
    model = parts.model
    with distributed.first_process_first("run directory"):
        shards = workdir.open_run(
            given,
            tower,
            layout,
            dataset.content_hash,
            mesh,
            model.head.loss if model.head else "",
            dataset.info.get("reading"),
        )
    checkpoints = Checkpoints(
        os.path.join(config.workdir, workdir.CHECKPOINTS),
        max_to_keep=config.loop.max_to_keep,
        every=config.loop.save_every,
        minutes=config.loop.save_minutes,
        best=os.path.join(config.workdir, workdir.BEST) if config.loop.monitor else None,
    )
    resumed = checkpoints.position(Position)
    split = "valid" if dataset.valid else "test"
    store = functools.lru_cache(maxsize=1)(
        lambda step: VectorStore(
            config.workdir, step, dataset.content_hash, num_processes=group.count
        )
    )
    common = {
        "loop": config.loop,
        "block": config.eval.block,
        "seed": config.seed,
        "shards": shards,
        "checkpoints": checkpoints,
        "stop": stop,
        "vectors": store if group.count == 1 else None,
    }
    trainer = _tower_trainer(config, parts, dataset, split, group, common)
    head = _head_trainer(config, parts, dataset, common)
    head_steps = build.head_steps(config, sizes.queries)
    in_head = trainer is None or (resumed is not None and resumed.head_from is not None)
    describe.show_setup(
        config, dataset, parts, sizes, mesh, trainer.batch_rows if trainer else None
    )
    describe.show_arrays(parts, sizes, console.detail)
    plans = [] if in_head else [trainer.plan(parts.like)]
    plans += [head.plan()] if head else []
    planned = memory_planner.with_process(
        memory_planner.largest(plans),
        parts.like,
        memory_planner.evaluation_bytes(
            model,
            [
                (model.mean_length(side), len(side))
                for side in (dataset.train, dataset.split(split)[0], dataset.labels)
            ],
            block=config.eval.block,
            labels=dataset.num_labels,
        ),
    )
    planned.check()
    console.status(describe.memory(planned))
    console.detail(str(planned))
    likes = [parts.like] + ([parts.head.like] if head else [])
    console.detail(
        checkpoints.check_disk_space(max(likes, key=lambda x: nbytes(x._replace(frozen=()))))
    )
    resumed_at = checkpoints.latest_step()
    epochs, tower_steps = 0, 0
    if trainer:
        epochs, tower_steps = config.loop.epochs, trainer.stage.steps
    console.status(
        f"output: {object_store.absolute(config.workdir)}, "
        + (
            "new run"
            if resumed_at is None
            else f"resumed at step {resumed_at} of {tower_steps + head_steps}"
        )
    )
    state, clusters, position = initial_state.first_state(
        config, parts, dataset, checkpoints, in_head, group
    )
    logger = MetricLogger(
        config.workdir,
        step=int(state.step),
        total_steps=tower_steps,
        num_epochs=epochs,
        later_steps=head_steps,
        learning_rates=build.learning_rates(config, tower_steps),
        flags=flag_fields.lines(given),
        peak_flops=accelerators.peak_flops(mesh.devices.flat),
        profile=profile,
        started_at=started_at,
    )
    try:
        if trainer:
            state, position = trainer.run(state, clusters, position, logger)
        if head:
            if position.head_from is None:
                # A device may not have memory for another model or optimizer.
                state = state._replace(opt_state=None)
                if position.best_step not in (None, int(state.step)):
                    step = state.step
                    del state
                    state, position = initial_state.best_state(
                        config, model, step, position, common["vectors"]
                    )
            state, position = head.run(state, position, logger)
        stop.raise_if_requested()  # By a signal that came after the last step.
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
    vectors_step = last_step if position.head_from is None else position.head_from
    if position.best_step is not None and position.head_from is None:
        # A device may not have memory for two models and an optimizer.
        del state, params, labels
        params, labels, last_step = saved_model.restore(config.workdir, model)
        vectors_step = last_step
    console.status(
        describe_final_model(config, position, trainer.steps_per_epoch if trainer else 1)
    )
    # In other cases `predict` computes the serving artifacts when it first needs them.
    serves = group.count == 1 and object_store.is_local(config.workdir)
    serving = os.path.join(config.workdir, artifacts.DIRECTORY)
    with stop.unwinding():
        evaluate.show(
            config,
            model,
            params,
            labels,
            dataset,
            split=split,
            search="exact",
            step=last_step,
            scoring=settings_lib.as_trained(config),
            tune=config.eval.tune if dataset.valid else (),
            vectors=store(vectors_step),
            save=functools.partial(artifacts.save, serving, dataset, last_step) if serves else None,
            group=group,
            decide_neighbours=split == "valid",
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


@contextlib.contextmanager
def _sole_writer(workdir: str) -> Iterator[None]:
    """Holds the lock of the run directory; an object store has no locks, and nothing is held."""
    if jax.process_index() or not object_store.is_local(workdir):
        yield
        return
    with errors.writing(f"--workdir={workdir}"):
        os.makedirs(workdir, exist_ok=True)
    try:
        with locks.exclusive(workdir, doing="training"):
            yield
    finally:
        with contextlib.suppress(OSError):  # There is something in it.
            os.rmdir(workdir)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    values = flags.FLAGS
    config = config_lib.from_flags(values)
    if not values.plan and (values.plan_devices or values.plan_size):
        raise InputError("--plan_devices and --plan_size have no effect without --plan: add --plan")
    profile = step_timer.parse_window(values.profile_steps)
    host_memory.bound_freed_pages()
    if values.deterministic:
        determinism.enable()
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
        with StopSignal().installed() as stop, stop.leaving(), _sole_writer(config.workdir):
            train(config, stop, profile=profile, data_cache=values.data_cache)


def define_flags() -> None:
    """Defines the flags of a run, and those that may differ each time it is started."""
    config_lib.define_flags()
    flags.DEFINE_boolean(
        "plan",
        False,
        "Print the memory of large arrays per device and the least time of a step, and stop. "
        "Nothing is allocated; the programs are compiled. The status is 2 if the run does not fit.",
    )
    flags.DEFINE_string(
        "plan_devices",
        "",
        "Devices to plan for, which need not exist: a TPU slice such as v5e:16x16, or GPUs of one "
        "machine such as h100:8. Empty: the devices of this machine.",
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
    flags.DEFINE_boolean(
        "deterministic",
        False,
        "Use deterministic operations alone on GPUs. A run that is resumed is then bit for bit one "
        "without interruption; steps are slower. CPUs and TPUs need no flag.",
    )
    compilation_cache.define_flag()
    object_store.define_flag()
    distributed.define_flags()


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS, resumable=True)
