"""The door that trains: `python -m vixml_jax.train --flagfile=experiments/X.flags`."""

import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from flax import linen as nn
from jax.sharding import Mesh

from vixml_jax import config as config_lib
from vixml_jax import errors, evaluate, evaluator, workdir
from vixml_jax.augmentation import neighbors
from vixml_jax.config import Config
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.data.text import tokenizer
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import accelerators as device_kinds
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import compilation_cache, host_memory, tree_utils
from vixml_jax.serving import artifacts
from vixml_jax.storage import object_store
from vixml_jax.structs import TrainState
from vixml_jax.training import image_warm_start, losses, optimizer, step_timer, train_step
from vixml_jax.training import memory_planner as plan_lib
from vixml_jax.training import train_state as state_lib
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.metric_logger import CollapseGuard, Telemetry
from vixml_jax.training.preemption import Stop


def make_tower(config: Config, dataset: PreparedDataset) -> tuple[TowerConfig, Layout]:
    """The tower's sizes, and how items are written for it; no weight is read."""
    flagged, end = config.model, None
    if flagged.pretrained:
        tower = hf_checkpoints.read_hf_config(flagged.pretrained)
        end = hf_checkpoints.end_token(flagged.pretrained)
    else:
        tower = fresh_tower(config, dataset)
    changes: dict[str, Any] = {
        "image_width": dataset.image_width if flagged.num_images else 0,
        "dtype": flagged.dtype,
        "scan": flagged.scan,
        "remat": flagged.remat,
    }
    num_images = flagged.num_images if dataset.image_width else 0
    if isinstance(tower, BertConfig):
        if flagged.pooling != "mean" or config.lora.rank:
            name = "--lora.rank" if config.lora.rank else "--model.pooling=last"
            raise InputError(f"{name}: an encoder has no such thing, decoders alone have")
        if flagged.dropout >= 0:
            changes |= {"dropout": flagged.dropout, "attention_dropout": flagged.dropout}
        layout = Layout(num_images)
    else:
        changes |= {"causal": flagged.causal, "pooling": flagged.pooling}
        if config.lora.rank:
            changes |= {
                "lora_rank": config.lora.rank,
                "lora_alpha": config.lora.alpha,
                "lora_maps": tuple(config.lora.maps),
            }
        layout = tokenizer.prompt_layout(
            tokenizer.load(os.path.dirname(dataset.tokenizer), dataset.max_tokens),
            **dataclasses.asdict(config.prompt),
            num_images=num_images,
            end=end,
        )
    try:
        tower = dataclasses.replace(tower, **changes)
    except ValueError as error:
        raise InputError(f"--lora.maps={','.join(config.lora.maps)}: {error}") from None
    # Some tokenizers name more tokens than their model has rows for; what counts is what is used.
    if dataset.vocab_size > tower.vocab_size and _largest_token(dataset) >= tower.vocab_size:
        raise InputError(
            f"--data={config.data} was tokenised with {dataset.vocab_size} tokens, but "
            f"--model.pretrained={flagged.pretrained} knows {tower.vocab_size}: prepare it again "
            "with --tokenizer set to the model"
        )
    longest = longest_item(layout, dataset)
    takes = (
        f"an item of {config.data} takes up to {longest} positions ({dataset.max_tokens} tokens, "
        f"{num_images} pictures, prompt)"
    )
    if longest > tower.max_positions:
        raise InputError(f"{takes}: above the {tower.max_positions} positions of the tower")
    if longest > config.batch.row_width:
        raise InputError(f"--batch.row_width={config.batch.row_width} is too narrow: {takes}")
    return tower, layout


def longest_item(layout: Layout, dataset: PreparedDataset) -> int:
    """Positions that an item takes at most."""
    return layout.overhead + dataset.max_tokens - sum(layout.trim)


def sizes_of(dataset: PreparedDataset) -> plan_lib.DataSizes:
    """How large the data are."""
    return plan_lib.DataSizes(len(dataset.train), dataset.num_labels)


def _largest_token(dataset: PreparedDataset) -> int:
    sides = (dataset.train, dataset.valid, dataset.test, dataset.labels)
    return max(int(np.max(side.tokens.values, initial=0)) for side in sides if side)


def fresh_tower(config: Config, dataset: PreparedDataset) -> TowerConfig:
    """The sizes of a tower from scratch, as the flags say."""
    flagged = config.model
    sizes = {
        "vocab_size": dataset.vocab_size,
        "num_layers": flagged.num_layers,
        "width": flagged.width,
        "num_heads": flagged.num_heads,
        "mlp_width": flagged.mlp_width,
        "max_positions": max(512, flagged.num_images + dataset.max_tokens),
    }
    if flagged.family == "encoder":
        return BertConfig(**sizes)
    return DecoderConfig(
        **sizes,
        num_kv_heads=flagged.num_heads,
        head_width=flagged.width // flagged.num_heads,
        qk_norm=True,
        # Words of unit size, as Gemma's: drawn at 0.02 they drown in what the first layer adds, and
        # all items look alike.
        word_scale=math.sqrt(flagged.width),
    )


def first_params(config: Config, model: Model, dataset: PreparedDataset) -> Any:
    """The pretrained tower's parameters, fresh ones beside them, the image projection started.

    All are read or made where, and as, they are stored.
    """
    given = {}
    if config.model.pretrained:
        dtype = config.lora.base_dtype if config.lora.rank else "float32"
        _, weights = hf_checkpoints.load_hf_tower(
            config.model.pretrained, dtype=dtype, mesh=model.mesh
        )
        given = {"tower": weights}
    known = tree_utils.paths(given)
    like = sharding.stored_tree(model.abstract_params, model.mesh)
    missing, _ = tree_utils.partition(like, lambda path: path not in known)

    def fresh(key: jax.Array) -> Any:
        """Those that are not given: the others are never made."""
        params = nn.unbox(model.init_params(key))
        return sharding.pad(
            tree_utils.partition(params, lambda path: path not in known)[0], missing
        )

    places = jax.tree.map(lambda x: x.sharding, missing)
    made = jax.jit(fresh, out_shardings=places)(jax.random.key(config.seed))
    params = tree_utils.merge(made, given)
    if model.layout.num_images and config.model.image_init == "regression":
        words = sharding.unpad(
            params["tower"]["word_embeddings"], model.abstract_params["tower"]["word_embeddings"]
        )
        words = sharding.on_host(words.astype(np.float32) * model.tower.config.word_scale)
        found = image_warm_start.regress_images(dataset, words)
        if found is not None:
            params["tower"]["image_projection"] = sharding.pad(
                {"kernel": found[0], "bias": found[1]}, like["tower"]["image_projection"]
            )
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, like))


def check_choice(config: Config, dataset: PreparedDataset, k: int) -> None:
    """Refuses a `--loop.choose_by` that the data do not allow, before anything is done.

    Raises:
      InputError: If there is nothing to choose by.
    """
    chosen = config.loop.choose_by
    names = evaluator.metric_names(k) if chosen else []
    if chosen and not dataset.valid:
        raise InputError(
            f"--loop.choose_by={chosen}: --data={config.data} has no validation split; prepare "
            "it again with --valid=0.02, say"
        )
    if chosen and chosen not in names:
        raise InputError(f"--loop.choose_by={chosen}: expected one of {', '.join(names)}")


def describe_choice(config: Config, position: trainer_lib.Position, steps_per_epoch: int) -> str:
    """Which epoch the run's model is of, and why."""
    last = position.epoch - 1
    if not position.epoch:
        return "model: untrained, as --loop.epochs=0 says"
    if position.best_step is None:
        return f"model: of the last epoch, {last}"
    chosen = position.best_step // steps_per_epoch - 1
    text = f"model: of epoch {chosen}, the best in {config.loop.choose_by} on valid"
    early = "" if position.epoch == config.loop.epochs else ", as --loop.patience says"
    return f"{text}, {position.best:.2f}; training ended with epoch {last}{early}"


class Parts(NamedTuple):
    """What a run is made of, before any of it is allocated.

    Attributes:
      model: Tower, combiner and table, without parameters.
      optimizer: Of all that is trained.
      like: Shapes, dtypes and shardings of the state.
      step: The training step, not yet compiled.
    """

    model: Model
    optimizer: optax.GradientTransformation
    like: TrainState
    step: train_step.TrainStep


def assemble(
    config: Config, tower: TowerConfig, layout: Layout, sizes: plan_lib.DataSizes, mesh: Mesh
) -> Parts:
    """The parts of a run on data of these sizes.

    Raises:
      InputError: If a batch is larger than the data.
    """
    if config.batch.size > sizes.queries:
        raise InputError(
            f"--batch.size={config.batch.size} is more than the {sizes.queries} training "
            f"queries of {config.data}"
        )
    model = workdir.build_model(config, tower, layout, sizes.labels, mesh)
    total_steps = config.loop.epochs * -(-sizes.queries // config.batch.size)
    tx = optimizer.make_optimizer(total_steps=total_steps, **dataclasses.asdict(config.optimizer))
    trained, frozen = workdir.split_params(model.abstract_params, tower)
    frozen = workdir.as_frozen(frozen, config.lora.base_dtype)
    like = state_lib.abstract_state(model, trained, frozen, tx, sizes.queries)
    loss = functools.partial(losses.total_loss, **dataclasses.asdict(config.loss))
    momentum = 0.95 if config.labels.centroids == "moving" else None
    made = train_step.make_train_step(
        model,
        loss,
        tx,
        like,
        centroid_momentum=momentum,
        sparse_free=config.labels.free_update == "sparse",
    )
    return Parts(model, tx, like, made)


def say_start(parts: Parts, sizes: plan_lib.DataSizes) -> None:
    """Prints what is stored padded, and every large array that a device will hold."""
    tables = state_lib.abstract_tables(parts.model, sizes.queries)
    for line in sharding.describe_padding(
        {**parts.model.abstract_params, **tables}, parts.model.mesh
    ):
        print(line)
    print(plan_lib.array_table(parts.like))


def plan(
    config: Config, *, devices: str = "", sizes: str = "", data_cache: str = object_store.CACHE
) -> None:
    """Prints what a run takes of a device, and stops: nothing is allocated, read or written of it.

    Of a pretrained tower the configuration is enough.

    Args:
      config: Of the run.
      devices: A slice of TPUs, "v5e:16x16" say, that need not be there; empty: the devices here.
      sizes: "queries:N,labels:N" in place of the data's own; items are then counted as long as
        `--max_tokens` of the prepared data lets them be.

    Raises:
      InputError: If it does not fit, or if there is no such slice.
    """
    mesh = workdir.make_mesh(config, plan_lib.slice_of(devices) if devices else None)
    with tempfile.TemporaryDirectory() as scratch:  # Where the built-in data go.
        dataset = workdir.open_dataset(dataclasses.replace(config, workdir=scratch), data_cache)
        check_choice(config, dataset, min(config.eval.k, dataset.num_labels))
        tower, layout = make_tower(config, dataset)
        found = plan_lib.DataSizes.parse(sizes, sizes_of(dataset))
        parts = assemble(config, tower, layout, found, mesh)
        length = 2.0 * longest_item(layout, dataset)
        if not sizes:
            length = sum(map(parts.model.mean_length, (dataset.train, dataset.labels)))
        pictures = [side.images is not None for side in (dataset.train, dataset.labels)]
        batch, key = plan_lib.abstract_batch(
            parts.model, config.batch.size, length, pictures=pictures, width=dataset.image_width
        )
        rows, width = batch.items.tokens.shape
        kind = mesh.devices.flat[0].device_kind
        chip = device_kinds.about(kind)
        published = (
            f" ({chip.memory / 2**30:.0f} GiB, {chip.peak_flops / 1e12:.0f} TFLOP/s each)"
            if chip
            else ""
        )
        along = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
        print(
            f"plan: {mesh.size} x {kind}{published}, --mesh={along}; {found.queries} queries, "
            f"{found.labels} labels; a batch of {config.batch.size} in {rows} rows of {width}"
        )
        say_start(parts, found)
        clock = time.perf_counter()
        planned = plan_lib.plan_memory(parts.like, lambda: parts.step.program(batch, key))
        planned.check()
        print(planned)
        print(f"compiled in {time.perf_counter() - clock:.0f} s; it fits")


def train(
    config: Config,
    stop: Stop | None = None,
    *,
    profile: tuple[int, int] | None = None,
    data_cache: str = object_store.CACHE,
) -> None:
    """Trains as the flags say, from where the run directory stands, and evaluates.

    Where the data have a validation split, all that is evaluated here is evaluated on it.

    Args:
      config: All that makes the run what it is.
      stop: Through which signals end the run; None: there are none to heed.
      profile: Steps to be profiled, as `watch.Profiler` takes them.
      data_cache: Where data from a store of objects are copied to.
    """
    group = distributed.world()
    with distributed.first_alone("data"):
        dataset = workdir.open_dataset(config, data_cache)
    k = min(config.eval.k, dataset.num_labels)
    check_choice(config, dataset, k)
    mesh = workdir.make_mesh(config)
    tower, layout = make_tower(config, dataset)
    parts = assemble(config, tower, layout, sizes_of(dataset), mesh)
    model, tx, like, _ = parts
    with distributed.first_alone("run directory"):
        shares = workdir.open_run(config, tower, layout, dataset.content_hash, mesh)
    steps_per_epoch = -(-len(dataset.train) // config.batch.size)
    total_steps = config.loop.epochs * steps_per_epoch
    checkpoints = Checkpoints(
        os.path.join(config.workdir, workdir.CHECKPOINTS),
        keep=config.loop.keep,
        every=config.loop.save_every,
        minutes=config.loop.save_minutes,
        best=os.path.join(config.workdir, workdir.BEST) if config.loop.choose_by else None,
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
        shares=shares,
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
        stop=stop or Stop(),
    )
    say_start(parts, sizes_of(dataset))
    planned = trainer.plan(like)
    planned.check()
    print(planned)
    print(checkpoints.check_room(like))

    params = first_params(config, model, dataset)
    resumed = checkpoints.latest_step()
    if resumed is None:
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
    if resumed is not None:
        state, clusters, position = checkpoints.restore(state, clusters)
        position = trainer_lib.Position(**position)
        print(f"{config.workdir}: resumed at step {resumed} of {total_steps}")
    telemetry = Telemetry(
        config.workdir,
        step=int(state.step),
        total_steps=total_steps,
        peak_flops=device_kinds.peak_flops(mesh.devices.flat),
        profile=profile,
    )
    try:
        state, position = trainer.run(state, clusters, position, telemetry)
    except OSError as error:
        said = errors.disk_fault(error)
        if said is None:
            raise
        raise InputError(
            f"--workdir={config.workdir}: {said} while training; checkpoints stand: make room and "
            "start again with the same command"
        ) from None
    finally:
        telemetry.close()
        checkpoints.close()
    if telemetry.watch.closing():
        print(telemetry.watch.closing())
    params, labels = tree_utils.merge(state.params, state.frozen), state.labels
    last = int(state.step)
    if position.best_step is not None:
        # Room first: a device may not hold two models beside an optimizer.
        del state, params, labels
        params, labels, last = workdir.restore_model(config.workdir, model)
    print(describe_choice(config, position, steps_per_epoch))
    evaluate.show(
        config,
        model,
        params,
        labels,
        dataset,
        split=split,
        search="exact",
        mixing=neighbors.as_trained(config.eval),
        # Of a store of objects, and of many processes, `predict` makes them when it is asked.
        keep=functools.partial(
            artifacts.keep, os.path.join(config.workdir, artifacts.DIRECTORY), dataset, last
        )
        if group.count == 1 and object_store.is_local(config.workdir)
        else None,
        group=group,
    )
    if split == "valid":
        print(f"to judge on test: python -m vixml_jax.evaluate --workdir={config.workdir}")
    print(
        f"run: {object_store.absolute(config.workdir)} (config.json, checkpoints/, metrics.jsonl, "
        "tensorboard/, evaluation/, answers/)"
    )


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    config = config_lib.from_flags(values)
    if not values.plan and (values.plan_devices or values.plan_size):
        raise InputError("--plan_devices and --plan_size say what to plan for: add --plan")
    profile = step_timer.parse_window(values.profile_steps)
    host_memory.keep_freed_pages()
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    # A program for devices that are not here can be written there, but not be read again.
    compilation_cache.keep_in("" if values.plan_devices else values.compile_cache)
    if values.plan:
        plan(
            config,
            devices=values.plan_devices,
            sizes=values.plan_size,
            data_cache=values.data_cache,
        )
    else:
        with Stop().caught() as stop:
            train(config, stop, profile=profile, data_cache=values.data_cache)


def define_flags() -> None:
    """The flags of a run, and those that may differ each time it is started."""
    config_lib.define_flags()
    compilation_cache.define_flag()
    object_store.define_flag()
    distributed.define_flags()
    flags.DEFINE_string(
        "profile_steps",
        "",
        "START:END: write a profile of the steps after START up to END to the run directory.",
    )
    flags.DEFINE_boolean(
        "plan", False, "Print every large array and what the run takes of a device, and stop."
    )
    flags.DEFINE_string(
        "plan_devices", "", "TPUs to plan for, not necessarily here: v5e:16x16, say; else those."
    )
    flags.DEFINE_string(
        "plan_size", "", "Sizes of data to plan for: queries:2000000,labels:10000000, say."
    )


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
