"""Builds the parts of a run from its flags: tower, model, optimizer, step, initial parameters."""

import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from vixml_jax import frozen_weights, workdir
from vixml_jax.config import Config
from vixml_jax.data import prepare_line
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.data.text import tokenizer
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.models import hf_checkpoints, hf_configs
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.tower import EncoderConfig, TowerConfig
from vixml_jax.parallel import sharding
from vixml_jax.runtime import console, tree_utils
from vixml_jax.structs import TrainState
from vixml_jax.training import head_trainer, image_warm_start, losses, optimizer, train_step
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.memory_planner import DataSizes

_MOST_STEPS = 100_000_000  # Of a run.
CENTROID_MOMENTUM = 0.95  # Of `--labels.centroids=moving`.


class HeadParts(NamedTuple):
    """What the head epochs of a run consist of, before any array is allocated.

    Attributes:
      optimizer: Updates {"head": parameters}.
      like: Shapes, dtypes and shardings of the whole state, with this optimizer's state.
      step: The step, not yet compiled; its state is that of `head_trainer.own_state`.
    """

    optimizer: optax.GradientTransformation
    like: TrainState
    step: train_step.TrainStep


class Parts(NamedTuple):
    """What a run consists of, before any array is allocated.

    Attributes:
      model: Tower, combiner, label table and head, without parameters.
      optimizer: Updates all trained parameters.
      like: Shapes, dtypes and shardings of the train state.
      step: The training step, not yet compiled.
      head: The same for the head epochs; None if the run has none. If it has only these, optimizer,
        state and step of the run are those of the head.
    """

    model: Model
    optimizer: optax.GradientTransformation
    like: TrainState
    step: train_step.TrainStep
    head: HeadParts | None = None


def make_tower(config: Config, dataset: PreparedDataset) -> tuple[TowerConfig, Layout]:
    """Returns the tower's configuration and the layout of items for it; reads no weights.

    Raises:
      InputError: If flags do not fit the kind of tower, or the data do not fit the tower.
    """
    options, end_token = config.model, None
    if options.pretrained:
        tower = hf_checkpoints.read_hf_config(options.pretrained, pooling=options.pooling)
        if options.pooling == hf_checkpoints.AUTO:
            for note in hf_checkpoints.read_pooling(options.pretrained).notes:
                console.status(note)
        end_token = hf_checkpoints.end_token(options.pretrained)
    else:
        tower = _tower_from_scratch(config, dataset)
    changes: dict[str, Any] = {
        "image_width": dataset.image_width if options.num_images else 0,
        "dtype": options.dtype,
        "scan": options.scan,
        "remat": options.remat,
    }
    num_images = options.num_images if dataset.image_width else 0
    if isinstance(tower, EncoderConfig):
        if config.lora.rank:
            raise InputError(
                f"--lora.rank={config.lora.rank}: works with decoders only, and this tower is an "
                "encoder"
            )
        if options.dropout >= 0:
            changes |= {"dropout": options.dropout, "attention_dropout": options.dropout}
        layout = Layout(num_images)
    else:
        if options.causal and not tower.causal:
            raise InputError(
                f"--model.pretrained={options.pretrained}: its positions attend in both directions "
                "(is_causal in config.json); add --model.causal=false"
            )
        if options.causal and tower.pooling == "cls":
            raise InputError(
                "--model.pooling=cls: the first token of a causal decoder sees no text; expected "
                "mean, last or weighted_mean, or --model.causal=false"
            )
        changes["causal"] = options.causal
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
            end=end_token,
        )
    try:
        tower = dataclasses.replace(tower, **changes)
    except ValueError as error:
        raise InputError(f"--lora.maps={','.join(config.lora.maps)}: {error}") from None
    hf_configs.check_sizes("the tower of these --model flags", tower)
    _check_data_fit(config, dataset, tower, layout)
    return tower, layout


def _tower_from_scratch(config: Config, dataset: PreparedDataset) -> TowerConfig:
    options = config.model
    sizes = {
        "vocab_size": dataset.vocab_size,
        "num_layers": options.num_layers,
        "width": options.width,
        "num_heads": options.num_heads,
        "mlp_width": options.mlp_width,
        "max_positions": max(512, options.num_images + dataset.max_tokens),
        "pooling": "mean" if options.pooling == hf_checkpoints.AUTO else options.pooling,
    }
    if options.family == "encoder":
        return BertConfig(**sizes)
    return DecoderConfig(
        **sizes,
        num_kv_heads=options.num_heads,
        head_width=options.width // options.num_heads,
        qk_norm=True,
        # Token embeddings of unit variance, as in Gemma. At the usual 0.02 the output of the first
        # layer would outweigh them, and all items would look alike.
        embedding_scale=math.sqrt(options.width),
    )


def _check_data_fit(
    config: Config, dataset: PreparedDataset, tower: TowerConfig, layout: Layout
) -> None:
    # Some tokenizers list more tokens than their model has embeddings for; what matters is the
    # largest id in use. Reading all tokens is slow, so only doubtful cases do it.
    if dataset.vocab_size > tower.vocab_size and _largest_token(dataset) >= tower.vocab_size:
        raise InputError(
            f"--data={config.data} was tokenized with a vocabulary of {dataset.vocab_size} tokens, "
            f"but --model.pretrained={config.model.pretrained} has {tower.vocab_size}: prepare the "
            "data with the tokenizer of the model: "
            + prepare_line.again(dataset.info, dataset.path, tokenizer=config.model.pretrained)
        )
    longest = longest_item(layout, dataset)
    need = (
        f"items of {config.data} take up to {longest} positions ({dataset.max_tokens} tokens, "
        f"{layout.num_images} images, prompt)"
    )
    if longest > tower.max_positions:
        raise InputError(
            f"{need}, but the tower has {tower.max_positions}: prepare the data again with a "
            "smaller --max_tokens"
        )
    if longest > config.batch.row_width:
        raise InputError(
            f"--batch.row_width={config.batch.row_width} is too narrow: {need}; set it to at least "
            f"{longest}"
        )


def _largest_token(dataset: PreparedDataset) -> int:
    sides = (dataset.train, dataset.valid, dataset.test, dataset.labels)
    return max(int(np.max(side.tokens.values, initial=0)) for side in sides if side)


def longest_item(layout: Layout, dataset: PreparedDataset) -> int:
    """Returns the largest number of positions that an item can take."""
    return layout.overhead + dataset.max_tokens - sum(layout.trim)


def sizes_of(dataset: PreparedDataset) -> DataSizes:
    """Returns the numbers of training queries and labels, and of labels per query."""
    queries = len(dataset.train)
    return DataSizes(queries, dataset.num_labels, dataset.train_relevance.nnz / max(1, queries))


def fit_batch(config: Config, sizes: DataSizes) -> Config:
    """Returns the flags with a batch size for these data, and says so if it is another one.

    A batch of more queries than there are becomes a quarter of them, so that an epoch still has
    some steps.

    Raises:
      InputError: If there is a single training query, which has nothing to be compared with.
    """
    size = config.batch.size
    if size <= sizes.queries or config.head.only:
        return config
    if sizes.queries < 2:
        raise InputError(
            f"--data={config.data}: found {sizes.queries} training query; expected at least 2, "
            "because a query is compared with the others of its batch"
        )
    fitting = max(2, sizes.queries // 4)
    negatives = min(config.loss.num_negatives, fitting - 1)
    also = ""
    if negatives != config.loss.num_negatives:
        also = f", --loss.num_negatives={negatives} in place of {config.loss.num_negatives}"
    console.status(
        f"note: --batch.size={size} is more than the {sizes.queries:,} training queries: using "
        f"--batch.size={fitting}{also}"
    )
    return dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, size=fitting),
        loss=dataclasses.replace(config.loss, num_negatives=negatives),
    )


def assemble(
    config: Config, tower: TowerConfig, layout: Layout, sizes: DataSizes, mesh: Mesh
) -> Parts:
    """Returns the parts of a run on data of these sizes, for flags that `fit_batch` returned."""
    _check_steps(config, sizes)
    if config.labels.prototypes and config.labels.num_heads > tower.width:
        raise InputError(
            f"--labels.num_heads={config.labels.num_heads}: expected at most {tower.width}, the "
            "width of the tower"
        )
    if max(config.loss.widths, default=0) > tower.width:
        raise InputError(
            f"--loss.widths={','.join(map(str, config.loss.widths))}: expected at most "
            f"{tower.width}, the width of the tower"
        )
    model = workdir.build_model(config, tower, layout, sizes.labels, mesh)
    head_parts = None
    if config.head.only or config.head.refit:
        head_parts = _head_parts(config, model, sizes)
    if config.head.only:
        return Parts(model, *head_parts, head_parts)
    params = model.abstract_params
    total_steps = config.loop.epochs * -(-sizes.queries // config.batch.size)
    tx = optimizer.make_optimizer(total_steps=total_steps, **dataclasses.asdict(config.optimizer))
    if config.head.weight:
        params = {**params, "head": model.abstract_head}
        tx = optimizer.with_head(tx, _head_optimizer(config, total_steps))
    trained, frozen = frozen_weights.split(params, tower)
    frozen = frozen_weights.as_stored(frozen, frozen_weights.dtype(config))
    like = state_lib.abstract_state(model, trained, frozen, tx, sizes.queries)
    step = train_step.make_train_step(
        model,
        functools.partial(losses.total_loss, **dataclasses.asdict(config.loss)),
        tx,
        like,
        centroid_momentum=CENTROID_MOMENTUM if config.labels.centroids == "moving" else None,
        sparse_free=config.labels.free_update == "sparse",
        head_weight=config.head.weight,
    )
    return Parts(model, tx, like, step, head_parts)


def _check_steps(config: Config, sizes: DataSizes) -> None:
    """Checks that the learning rate of each step can be held in memory.

    Raises:
      InputError: If there are too many steps.
    """
    steps = config.loop.epochs * -(-sizes.queries // config.batch.size)
    for name, epochs, count in (
        ("loop.epochs", config.loop.epochs, 0 if config.head.only else steps),
        ("head.epochs", config.head.epochs, head_steps(config, sizes.queries)),
    ):
        if count > _MOST_STEPS:
            raise InputError(
                f"--{name}={epochs}: {count:,} steps on these data, expected at most "
                f"{_MOST_STEPS:,}; train fewer epochs, or in larger batches"
            )


def _head_parts(config: Config, model: Model, sizes: DataSizes) -> HeadParts:
    tower = model.tower.config
    tx = _head_optimizer(config, head_steps(config, sizes.queries))
    head_only = frozen_weights.split(
        {**model.abstract_params, "head": model.abstract_head}, tower, head_only=True
    )[0]
    moments = state_lib.abstract_state(model, head_only, {}, tx, sizes.queries)
    trained, frozen = frozen_weights.split(
        {**model.abstract_params, "head": model.abstract_head}, tower, head_only=config.head.only
    )
    frozen = frozen_weights.as_stored(frozen, frozen_weights.dtype(config))
    like = moments._replace(
        params=sharding.stored_tree(trained, model.mesh),
        frozen=sharding.stored_tree(frozen, model.mesh),
    )
    return HeadParts(tx, like, train_step.make_head_step(model, tx, head_trainer.own_state(like)))


def _head_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    rate = head_trainer.learning_rate(config.head, total_steps)
    return optimizer.head_optimizer(rate, config.head.moments)


def head_steps(config: Config, num_queries: int) -> int:
    """Returns the number of steps of all head epochs of a run; 0 if it has none."""
    if not config.head.only and not config.head.refit:
        return 0
    return config.head.epochs * -(-num_queries // config.head.batch_size)


def learning_rates(config: Config, total_steps: int) -> dict[str, np.ndarray]:
    """Returns the learning rate of each parameter group in each step, as arrays on the host."""
    options, steps = config.optimizer, np.arange(total_steps)
    schedules = optimizer.schedules(
        learning_rate=options.learning_rate,
        label_learning_rate=options.label_learning_rate,
        image_learning_rate=options.image_learning_rate,
        warmup_steps=options.warmup_steps,
        total_steps=total_steps,
    )
    if config.head.weight:
        schedules["head"] = head_trainer.learning_rate(config.head, total_steps)
    return {group: np.asarray(schedule(steps)) for group, schedule in schedules.items()}


def initial_params(config: Config, model: Model, dataset: PreparedDataset) -> Any:
    """Returns all parameters: pretrained ones where there are, fresh ones for the rest.

    Each is read or made with the sharding and dtype in which it is stored. With
    `--model.image_init=regression` the image projection is fitted to the data.
    """
    pretrained = {}
    if config.model.pretrained:
        _, weights = hf_checkpoints.load_hf_tower(
            config.model.pretrained,
            dtype=frozen_weights.dtype(config),
            mesh=model.mesh,
            pooling=config.model.pooling,
        )
        pretrained = {"tower": weights}
    pretrained_paths = tree_utils.paths(pretrained)
    like = sharding.stored_tree(model.abstract_params, model.mesh)
    missing, _ = tree_utils.partition(like, lambda path: path not in pretrained_paths)

    def make_missing(key: jax.Array) -> Any:
        """Returns fresh parameters; XLA drops the computation of those that are pretrained."""
        params = nn.unbox(model.init_params(key))
        fresh, _ = tree_utils.partition(params, lambda path: path not in pretrained_paths)
        return sharding.pad(fresh, missing)

    shardings = jax.tree.map(lambda x: x.sharding, missing)
    fresh = jax.jit(make_missing, out_shardings=shardings)(jax.random.key(config.seed))
    params = tree_utils.merge(fresh, pretrained)
    if model.layout.num_images and config.model.image_init == "regression":
        tokens = sharding.unpad(
            params["tower"]["word_embeddings"], model.abstract_params["tower"]["word_embeddings"]
        )
        scale = model.tower.config.embedding_scale
        tokens = sharding.on_host(tokens.astype(np.float32) * scale)
        fitted = image_warm_start.regress_images(dataset, tokens)
        if fitted is not None:
            kernel, bias = fitted
            params["tower"]["image_projection"] = sharding.pad(
                {"kernel": kernel, "bias": bias}, like["tower"]["image_projection"]
            )
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, like))
