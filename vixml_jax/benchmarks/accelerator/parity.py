"""A training step on the default device against the same on the CPU: vectors, loss, gradients.

The reference is float32 on the CPU at the highest precision of products. The same weights and items
take the step on the device in several ways, without dropout. Half of the rows are padding alone.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vixml_jax.benchmarks import train_step, vision
from vixml_jax.benchmarks.accelerator.results import Row, at_most
from vixml_jax.benchmarks.memory import __main__ as memory
from vixml_jax.benchmarks.support import steps
from vixml_jax.config import BatchConfig, Config, LabelsConfig, LossConfig
from vixml_jax.data import packing
from vixml_jax.data.store import Items, Ragged
from vixml_jax.models import published_towers as towers
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.siglip import SiglipConfig, VisionTower
from vixml_jax.parallel import sharding
from vixml_jax.structs import Batch, Shard
from vixml_jax.training import train_state as state_lib

EXACT = 1e-5  # Float32 at the highest precision, where only the order of sums differs.
COARSE = {"vectors": 2e-2, "loss": 2e-2, "gradient": 0.1}  # A wrong mask changes far more.
SMALL = 0.05  # Gradients with a smaller part of the norm of all are compared with this part.
ITEMS = 24  # Queries, and labels.
IMAGE_WIDTH = 48
ROW_WIDTHS = {"full": 512, "tiny": 64}
_VOCABULARY = 2000
_GEMMA = towers.CONFIGS["google/gemma-3-4b-it"]["text_config"]
# Changes of published sizes: few layers and tokens, so that the CPU keeps up.
TOWERS: dict[str, dict[str, Any]] = {
    "MiniLM": {"tower": "all-minilm-l6", "full": {"num_hidden_layers": 2}},
    "MPNet": {"tower": "all-mpnet-base", "full": {"num_hidden_layers": 1}},
    "ModernBERT": {"tower": "modernbert-base", "full": {"num_hidden_layers": 3}},
    "Qwen2.5 with adapters and images": {
        "tower": "qwen2.5-0.5b", "rank": 8, "images": 2, "full": {"num_hidden_layers": 2},
    },
    "Gemma 3, heads of 256": {
        "tower": "gemma-3-4b-it", "nested": _GEMMA,
        "full": {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1024},
    },
}  # fmt: skip
_TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "head_dim": 8,
}  # fmt: skip
_TINY_TOWERS = ("MiniLM", "Qwen2.5 with adapters and images")


class Found(NamedTuple):
    """What a step computes.

    Attributes:
      vectors: Unit vectors of the queries [b, e].
      loss: Of the batch.
      gradient: By parameter.
    """

    vectors: np.ndarray
    loss: float
    gradient: dict[str, np.ndarray]


class Case(NamedTuple):
    """A tower and what its step starts from, on the host.

    Attributes:
      tower: Sizes; the dtype is float32.
      layout: Of the items.
      batch: One batch.
      weights: Trained and frozen parameters, and centroids, float32.
    """

    tower: Any
    layout: packing.Layout
    batch: Batch
    weights: tuple[Any, Any, np.ndarray]


def compare(settings: dict[str, Any]) -> list[Row]:
    """The differences, for each tower and each way to compute."""
    names = TOWERS if settings["size"] == "full" else _TINY_TOWERS
    rows = []
    for name in names:
        for row in _of_tower(make_case(name, settings["size"])):
            row.what = f"{name}, {row.what}"
            print(row, flush=True)
            rows.append(row)
    return rows + _of_images(settings)


def make_case(name: str, size: str) -> Case:
    """A tower with random weights, and random items for it."""
    about = TOWERS[name]
    sizes = {**(about["full"] if size == "full" else _TINY), "vocab_size": _VOCABULARY}
    if "nested" in about:
        sizes = {"text_config": {**about["nested"], **sizes}}
    tower = train_step.config_of({"tower": about["tower"], "sizes": sizes})
    images = about.get("images", 0)
    changes: dict[str, Any] = {"image_width": IMAGE_WIDTH if images else 0}
    if isinstance(tower, DecoderConfig):
        changes["lora_rank"] = about.get("rank", 0)
    else:
        changes |= {"dropout": 0.0, "attention_dropout": 0.0}
    names = {field.name for field in dataclasses.fields(tower)}
    tower = dataclasses.replace(tower, **{k: v for k, v in changes.items() if k in names})
    layout = train_step.layout_of(about["tower"], images)
    width = ROW_WIDTHS[size]
    with jax.default_device(_cpu()):
        parts = _parts(tower, layout, width, _cpu(), LossConfig())
        state = steps.fresh_state(parts, jax.random.key(0))
        rng = np.random.default_rng(0)
        # Otherwise factors of adapters and biases would be zero, and with them some gradients.
        shaken = jax.tree.map(
            lambda x: np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32),
            (state.params, state.frozen),
        )
    centroids = rng.standard_normal((ITEMS, tower.width), np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return Case(tower, layout, make_batch(layout, width), (*shaken, centroids))


def make_batch(layout: packing.Layout, width: int, *, empty: bool = False) -> Batch:
    """Random queries, each with one label, in rows of which as many are padding alone.

    Args:
      layout: Of the items.
      width: Positions of a row.
      empty: All rows are padding, and there are no items.
    """
    rng = np.random.default_rng(1)
    lengths = rng.integers(4, 25, 2 * ITEMS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(8, _VOCABULARY, offsets[-1]).astype(np.int32)
    images = None
    if layout.num_images:  # Two items of three have some.
        counts = rng.integers(0, layout.num_images + 1, 2 * ITEMS)
        values = rng.standard_normal((counts.sum(), IMAGE_WIDTH), np.float32)
        images = Ragged(values.astype(np.float16), np.concatenate([[0], np.cumsum(counts)]))
    items = Items([""] * (2 * ITEMS), Ragged(tokens, offsets), images)
    ids = np.full(2 * ITEMS, -1) if empty else np.arange(2 * ITEMS)
    used = len(packing.pack(items, np.arange(2 * ITEMS), width=width, layout=layout).tokens)
    packed = packing.pack(
        items, ids, width=width, layout=layout, rows=packing.RowSizes(2 * used, 1)
    )
    like = {"batch": ITEMS, "length": 32, "chunk": 0}
    batch = memory.random_batch(like, 1)._replace(items=packed)
    if empty:
        absent = np.full_like(batch.query_ids, -1)
        batch = batch._replace(query_ids=absent, label_ids=absent)
    return batch


def _of_tower(case: Case) -> Iterator[Row]:
    """The checks of one tower."""
    device, width = jax.devices()[0], case.batch.items.tokens.shape[1]
    empty = make_batch(case.layout, width, empty=True)
    softmax, triplet = LossConfig(kind="softmax"), LossConfig()
    reference = {loss: step(case, loss, _cpu()) for loss in (softmax, triplet)}
    for loss in (softmax, triplet):
        found = step(case, loss, device)
        yield from _differences(f"float32 highest, {loss.kind}", found, reference[loss], EXACT)
    found = step(case, softmax, device, precision="default")
    yield from _differences("float32 default", found, reference[softmax], COARSE)

    half = case._replace(tower=dataclasses.replace(case.tower, dtype="bfloat16"))
    with fused_attention(allowed=False):
        plain = step(half, softmax, device, precision="default")
    yield from _differences("bfloat16 without cuDNN", plain, reference[softmax], COARSE)
    with fused_attention() as used:
        found = step(half, softmax, device, precision="default")
    yield Row("bfloat16, cuDNN's attention is used", "yes" if "cudnn" in used else "no")
    if "cudnn" in used:  # It may lose no more than rounding does anyway.
        lost = errors(plain, reference[softmax])
        limits = {name: 2 * error + 1e-3 for name, error in lost.items()}
        yield from _differences("bfloat16 with cuDNN", found, reference[softmax], limits)
    for name, one, precision in (("float32", case, "highest"), ("bfloat16", half, "default")):
        found = step(one._replace(batch=empty), softmax, device, precision=precision)
        size = max(np.abs(x).max() for x in (*found.gradient.values(), np.float32(found.loss)))
        yield at_most(f"{name}, rows of padding alone: loss and gradients", size, 0.0)


def step(case: Case, loss: LossConfig, device: jax.Device, *, precision: str = "highest") -> Found:
    """The step of a case on one device, in the dtype of its tower."""
    width = case.batch.items.tokens.shape[1]
    trained, frozen, centroids = case.weights
    with jax.default_device(device), jax.default_matmul_precision(precision):
        parts = _parts(case.tower, case.layout, width, device, loss)
        model, like = parts.model, parts.like
        labels = model.table.init_state(np.arange(ITEMS, dtype=np.int32))
        labels = model.table.with_centroids(labels, Shard(np.arange(ITEMS), centroids))
        frozen = jax.tree.map(lambda x, like: x.astype(like.dtype), frozen, like.frozen)
        bank = state_lib.empty_bank(model, ITEMS)
        state = state_lib.place_state(like, trained, frozen, parts.optimizer, labels, bank)
        batch = sharding.to_devices(case.batch, model.mesh)
        key = jax.device_put(jax.random.key(0), sharding.replicated(model.mesh))
        state, scalars = parts.step(state, batch, key)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    gradient = {sharding.path_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
    return Found(np.asarray(state.bank), float(scalars["loss"]), gradient)


def _parts(
    tower: Any,
    layout: packing.Layout,
    width: int,
    device: jax.Device,
    loss: LossConfig,
) -> steps.Parts:
    """A step whose optimizer changes nothing and keeps the gradient as its state."""

    def zeros(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    keep = optax.GradientTransformation(
        zeros, lambda gradient, state, params=None: (zeros(gradient), gradient)
    )
    config = Config(
        labels=LabelsConfig(dropout=0.0, mlp_width=64, num_free=ITEMS),
        batch=BatchConfig(row_width=width),
        loss=loss,
    )
    return steps.build(
        config,
        tower,
        layout,
        num_queries=ITEMS,
        num_labels=ITEMS,
        mesh=sharding.create_mesh(devices=[device]),
        tx=keep,
    )


def errors(found: Found, reference: Found) -> dict[str, float]:
    """The largest difference of vectors, the relative one of the loss, and that of a gradient.

    The gradient of each parameter is compared with its norm, or with `SMALL` of the norm of all
    gradients if that is more: those of some biases are zero but for rounding.
    """
    total = math.sqrt(sum(np.sum(x**2) for x in reference.gradient.values()))
    relative = [
        np.linalg.norm(found.gradient[name] - x) / max(np.linalg.norm(x), SMALL * total)
        for name, x in reference.gradient.items()
    ]
    return {
        "vectors": float(np.abs(found.vectors - reference.vectors).max()),
        "loss": abs(found.loss - reference.loss) / abs(reference.loss),
        "gradient": float(np.max(relative)),
    }


def _differences(
    how: str, found: Found, reference: Found, limits: dict[str, float] | float
) -> Iterator[Row]:
    for name, error in errors(found, reference).items():
        limit = limits if isinstance(limits, float) else limits[name]
        yield at_most(f"{how}: {name}", error, limit)


@contextlib.contextmanager
def fused_attention(*, allowed: bool = True) -> Iterator[list[str | None]]:
    """Gathers the implementations that JAX's attention is asked for; XLA's if not `allowed`."""
    asked: list[str | None] = []
    attend = jax.nn.dot_product_attention

    def noted(*args: Any, implementation: Any = None, **kwargs: Any) -> jax.Array:
        asked.append(implementation if allowed else "xla")
        return attend(*args, implementation=asked[-1], **kwargs)

    with mock.patch.object(jax.nn, "dot_product_attention", noted):
        yield asked


def _of_images(settings: dict[str, Any]) -> list[Row]:
    """Vectors of the vision tower on the device against those on the CPU."""
    sizes = dict(vision.SIZES["so400m" if settings["size"] == "full" else "tiny"])
    sizes["num_layers"] = 2
    config = SiglipConfig(**sizes)
    pixels = vision.pixels_of({"batch": 2}, config.image_size)

    def encode(
        config: SiglipConfig, weights: Any, device: jax.Device, precision: str
    ) -> np.ndarray:
        tower = VisionTower.on(device, config)
        weights, images = jax.device_put((weights, pixels), device)
        with jax.default_device(device), jax.default_matmul_precision(precision):
            run = jax.jit(lambda weights, images: tower.apply({"params": weights}, images))
            vectors = np.asarray(run(weights, images), np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    with jax.default_device(_cpu()):
        made = jax.jit(VisionTower(config).init)(jax.random.key(0), pixels[:1])
        weights = jax.device_get(nn.unbox(made)["params"])
    reference = encode(config, weights, _cpu(), "highest")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    halved = dataclasses.replace(config, dtype="bfloat16")
    found = {
        "float32 highest": (encode(config, weights, jax.devices()[0], "highest"), EXACT),
        "bfloat16": (encode(halved, half, jax.devices()[0], "default"), COARSE["vectors"]),
    }
    return [
        at_most(f"SigLIP, {how}: vectors", float(np.abs(vectors - reference).max()), limit)
        for how, (vectors, limit) in found.items()
    ]


def _cpu() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]
