"""The door that trains: `python -m vixml_jax.train --flagfile=experiments/X.flags`."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from vixml_jax import config as config_lib
from vixml_jax import errors, evaluate, memory, runs, sharding, trees
from vixml_jax.config import Config
from vixml_jax.data import tokenize
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.encoding import Model
from vixml_jax.errors import InputError
from vixml_jax.models import hf
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.training import loop, losses, optimizer, step, warm_start
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.stopping import Stop
from vixml_jax.training.telemetry import CollapseGuard, Telemetry


def make_tower(config: Config, dataset: PreparedDataset) -> tuple[TowerConfig, Layout]:
    """The tower's sizes, and how items are written for it; no weight is read."""
    flagged, end = config.model, None
    if flagged.pretrained:
        tower = hf.read_hf_config(flagged.pretrained)
        end = hf.end_token(flagged.pretrained)
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
        layout = tokenize.prompt_layout(
            tokenize.load(os.path.dirname(dataset.tokenizer), dataset.max_tokens),
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
    longest = layout.overhead + dataset.max_tokens - sum(layout.trim)
    takes = (
        f"an item of {config.data} takes up to {longest} positions ({dataset.max_tokens} tokens, "
        f"{num_images} pictures, prompt)"
    )
    if longest > tower.max_positions:
        raise InputError(f"{takes}: above the {tower.max_positions} positions of the tower")
    if longest > config.batch.row_width:
        raise InputError(f"--batch.row_width={config.batch.row_width} is too narrow: {takes}")
    return tower, layout


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


def first_params(config: Config, model: Model, dataset: PreparedDataset, shardings: Any) -> Any:
    """The pretrained tower's parameters, fresh ones beside them, the image projection started.

    All are read or made where `shardings` say.
    """
    given = {}
    if config.model.pretrained:
        dtype = config.lora.base_dtype if config.lora.rank else "float32"
        _, weights = hf.load_hf_tower(config.model.pretrained, dtype=dtype, mesh=model.mesh)
        given = {"tower": weights}
    known = trees.paths(given)

    def fresh(key: jax.Array) -> Any:
        """Those that are not given: the others are never made."""
        params = nn.unbox(runs.init_params(model, key))
        return trees.partition(params, lambda path: path not in known)[0]

    places, _ = trees.partition(shardings, lambda path: path not in known)
    made = jax.jit(fresh, out_shardings=places)(jax.random.key(config.seed))
    params = trees.merge(made, given)
    if model.layout.num_images and config.model.image_init == "regression":
        scale = model.tower.config.word_scale
        words = np.asarray(params["tower"]["word_embeddings"].astype(np.float32) * scale)
        found = warm_start.regress_images(dataset, words)
        if found is not None:
            params["tower"]["image_projection"] = {"kernel": found[0], "bias": found[1]}
    return jax.device_put(params, shardings)


def check_choice(config: Config, dataset: PreparedDataset, k: int) -> None:
    """Refuses a `--loop.choose_by` that the data do not allow, before anything is done.

    Raises:
      InputError: If there is nothing to choose by.
    """
    chosen = config.loop.choose_by
    names = evaluate.metric_names(k) if chosen else []
    if chosen and not dataset.valid:
        raise InputError(
            f"--loop.choose_by={chosen}: --data={config.data} has no validation split; prepare "
            "it again with --valid=0.02, say"
        )
    if chosen and chosen not in names:
        raise InputError(f"--loop.choose_by={chosen}: expected one of {', '.join(names)}")


def describe_choice(config: Config, position: loop.Position, steps_per_epoch: int) -> str:
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


def train(config: Config, stop: Stop | None = None) -> None:
    """Trains as the flags say, from where the run directory stands, and evaluates.

    Where the data have a validation split, all that is evaluated here is evaluated on it.

    Args:
      config: The flags.
      stop: Through which signals end the run; None: there are none to heed.
    """
    dataset = runs.open_dataset(config)
    k = min(config.eval.k, dataset.num_labels)
    check_choice(config, dataset, k)
    mesh = runs.make_mesh(config)
    tower, layout = make_tower(config, dataset)
    model = runs.build_model(config, tower, layout, dataset.num_labels, mesh)
    if config.batch.size > len(dataset.train):
        raise InputError(
            f"--batch.size={config.batch.size} is more than the {len(dataset.train)} training "
            f"queries of {config.data}"
        )
    runs.open_run(config, tower, layout, dataset.content_hash)

    steps_per_epoch = -(-len(dataset.train) // config.batch.size)
    total_steps = config.loop.epochs * steps_per_epoch
    tx = optimizer.make_optimizer(total_steps=total_steps, **dataclasses.asdict(config.optimizer))
    boxed = jax.eval_shape(lambda: runs.init_params(model, jax.random.key(0)))
    trained, kept = runs.split_params(boxed, tower)
    kept = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(config.lora.base_dtype)), kept)
    like = loop.abstract_state(model, trained, kept, tx, len(dataset.train))
    checkpoints = Checkpoints(
        os.path.join(config.workdir, runs.CHECKPOINTS),
        keep=config.loop.keep,
        every=config.loop.save_every,
        minutes=config.loop.save_minutes,
        best=os.path.join(config.workdir, runs.BEST) if config.loop.choose_by else None,
    )
    split = "valid" if dataset.valid else "test"
    trainer = loop.Trainer(
        model,
        dataset,
        step.make_train_step(
            model,
            functools.partial(losses.total_loss, **dataclasses.asdict(config.loss)),
            tx,
            like,
            centroid_momentum=0.95 if config.labels.centroids == "moving" else None,
        ),
        batch=config.batch,
        labels=config.labels,
        loop=config.loop,
        block=config.eval.block,
        seed=config.seed,
        checkpoints=checkpoints,
        guard=CollapseGuard(margin=config.loss.margin_min, num_negatives=config.loss.num_negatives),
        evaluate=lambda params, labels: evaluate.evaluate_model(
            model,
            params,
            labels,
            dataset,
            split=split,
            k=k,
            block=config.eval.block,
            titles=False,
        )["metrics"],
        split=split,
        stop=stop or Stop(),
    )
    plan = trainer.plan(like)
    plan.check()
    print(plan)
    print(checkpoints.check_room(like))

    params = first_params(config, model, dataset, sharding.shardings_of(boxed, mesh))
    resumed = checkpoints.latest_step()
    if resumed is None:
        params, labels, bank = loop.initial_labels(
            model,
            params,
            dataset,
            labels=config.labels,
            block=config.eval.block,
            seed=config.seed,
        )
    else:
        labels = model.table.init_state(np.zeros(dataset.num_labels, np.int32))
        bank = loop.empty_bank(model, len(dataset.train))
    params, frozen = runs.split_params(params, tower)
    runs.save_frozen(config.workdir, frozen)
    state = loop.place_state(like, params, frozen, tx, labels, bank)
    del params, frozen, bank, labels
    clusters, position = trainer.start()
    if resumed is not None:
        state, clusters, position = checkpoints.restore(state, clusters)
        position = loop.Position(**position)
        print(f"{config.workdir}: resumed at step {resumed} of {total_steps}")
    telemetry = Telemetry(
        config.workdir,
        step=int(state.step),
        total_steps=total_steps,
        batch_size=config.batch.size,
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
    params, labels = trees.merge(state.params, state.frozen), state.labels
    if position.best_step is not None:
        # Room first: a device may not hold two models beside an optimizer.
        del state, params, labels
        params, labels, _ = runs.restore_model(config.workdir, model)
    print(describe_choice(config, position, steps_per_epoch))
    evaluate.show(config, model, params, labels, dataset, split=split, search="exact")
    if split == "valid":
        print(f"to judge on test: python -m vixml_jax.evaluate --workdir={config.workdir}")
    print(
        f"run: {os.path.abspath(config.workdir)} (config.json, checkpoints/, metrics.jsonl, "
        "tensorboard/, evaluation/)"
    )


def main(argv: Sequence[str]) -> None:
    del argv
    config = config_lib.from_flags(flags.FLAGS)
    memory.keep_freed_pages()
    cache = os.path.join(os.path.expanduser("~"), ".cache", "vixml_jax", "programs")
    jax.config.update("jax_compilation_cache_dir", cache)
    with Stop().caught() as stop:
        train(config, stop)


if __name__ == "__main__":
    config_lib.define_flags()
    errors.launch(main)
