"""Floating-point operations of a training step, counted from the sizes of the model.

A multiplication and an addition count as two operations. Matrix products are counted: dense layers,
adapters, attention within the true lengths of the items, the combiner, the similarities and the
label head. Not counted are embeddings, norms and everything else that is linear in the width,
padding, and activations that are recomputed to save memory. Divided by the peak of the devices, the
count gives the model FLOPs utilisation (MFU, arXiv 2204.02311).

The gradient of a product's input costs as much as the product, and so does that of its weight.
Frozen weights need no gradient, and neither do images, which are inputs.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.config import Config
from vixml_jax.errors import InputError
from vixml_jax.labels.head import LabelHead
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.models import published_towers
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.modernbert import ModernBertConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import accelerators
from vixml_jax.structs import Batch, PackedItems

DEVICE = "NVIDIA H100 80GB HBM3"  # Of `describe_hours`.
EFFICIENCY = 0.4  # Fraction of a device's peak that a run is assumed to reach.
PROMPT = 8  # Positions of a decoder's prompt, about.


class Flops(NamedTuple):
    """Numbers of floating-point operations.

    Attributes:
      forward: Operations of the forward pass.
      step: Operations of the forward and the backward pass.
    """

    forward: float
    step: float

    def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]
        return Flops(self.forward + other.forward, self.step + other.step)


def step_flops(
    config: TowerConfig,
    combiner: Combiner | None,
    batch: Batch,
    head: LabelHead | None = None,
    widths: Sequence[int] = (),
) -> float:
    """Operations of one training step.

    Args:
      config: Sizes of the tower.
      combiner: The prototype network, or None.
      batch: A batch on the host.
      head: The label head, if the step trains it; the batch then has all labels of its queries.
      widths: Widths of vectors beside the full one that the loss compares (`--loss.widths`).
    """
    queries, labels = (
        int(np.count_nonzero(ids >= 0)) for ids in (batch.query_ids, batch.label_ids)
    )
    images = int(np.count_nonzero(batch.items.image_at >= 0))
    total = tower_flops(config, item_lengths(batch.items), images)
    compared = sum({*widths, config.width})
    total += similarity_flops(queries, labels, compared, 1 if combiner is None else 2)
    if combiner is not None:
        total += combiner_flops(combiner, labels, config.width)
    if head is not None:
        total += head_flops(head, queries, int(np.count_nonzero(batch.positives.labels >= 0)))
    return total.step


def item_lengths(items: PackedItems) -> Int[np.ndarray, " n"]:
    """Number of positions (text, images, prompt) of each item; 0 for absent items."""
    segments = np.asarray(items.segments)
    return np.bincount(segments[segments >= 0])


def tower_flops(config: TowerConfig, lengths: Int[np.ndarray, " n"], num_images: int) -> Flops:
    """Operations of a tower.

    With adapters, all other weights of the tower count as frozen. The gradient of every layer's
    input is counted, although the first layer's is not needed without images.

    Args:
      config: Sizes of the tower.
      lengths: Number of positions of each item.
      num_images: Number of images projected into the tower.
    """
    positions = float(np.sum(lengths))
    maps, adapted = _maps(config)
    weights = sum(inputs * outputs for inputs, outputs in maps.values())
    rank = getattr(config, "lora_rank", 0)
    low_rank = sum(rank * sum(maps[name]) for name in adapted)
    dense = 2.0 * positions * config.num_layers * weights
    adapters = 2.0 * positions * config.num_layers * low_rank
    attention = _attention(config, lengths)
    images = 2.0 * num_images * config.image_width * config.width
    return Flops(
        dense + adapters + attention + images,
        (2 if rank else 3) * dense + 3 * (adapters + attention) + 2 * images,
    )


def _maps(config: TowerConfig) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Input and output width of each dense layer of a block, and the layers with adapters."""
    d, m = config.width, config.mlp_width
    if isinstance(config, BertConfig):
        maps = dict.fromkeys(("query", "key", "value", "out"), (d, d))
        return maps | {"up": (d, m), "down": (m, d)}, ()
    if isinstance(config, ModernBertConfig):
        maps = {"query_key_value": (d, 3 * d), "out": (d, d)}
        return maps | {"up": (d, 2 * m), "down": (m, d)}, ()
    q, kv = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    maps = {
        "query": (d, q), "key": (d, kv), "value": (d, kv), "out": (q, d),
        "gate": (d, m), "up": (d, m), "down": (m, d),
    }  # fmt: skip
    return maps, config.lora_maps if config.lora_rank else ()


def _attention(config: TowerConfig, lengths: Int[np.ndarray, " n"]) -> float:
    """Operations of attention scores and weighted sums, of all layers."""
    if isinstance(config, BertConfig):
        return 4.0 * config.num_layers * config.width * attended_pairs(lengths, causal=False)
    sliding = int(np.count_nonzero(config.slides))
    causal = isinstance(config, DecoderConfig) and config.causal
    pairs = (config.num_layers - sliding) * attended_pairs(lengths, causal=causal)
    if sliding:
        pairs += sliding * attended_pairs(lengths, causal=causal, window=config.window)
    return 4.0 * config.num_heads * config.head_width * pairs


def attended_pairs(lengths: Int[np.ndarray, " n"], *, causal: bool, window: int = 0) -> float:
    """Number of pairs of positions of the same item of which one attends to the other.

    Args:
      lengths: Number of positions of each item.
      causal: Whether a position attends only to itself and earlier positions.
      window: Positions attend only to those at a smaller distance; 0: to all.
    """
    n = np.asarray(lengths, np.float64)
    near = np.minimum(n, window) if window else n
    # Itself and earlier ones: 1, 2, ... up to the window, then the size of the window each time.
    before = near * (near + 1) / 2 + (n - near) * near
    return float(np.sum(before if causal else 2 * before - n))


def combiner_flops(combiner: Combiner, num_labels: int, width: int) -> Flops:
    """Operations of the prototype network; all its weights are trained."""
    tokens = 1 + combiner.uses_free + combiner.uses_centroid
    weights = 4 * width * width + 2 * width * combiner.mlp_width
    forward = num_labels * (2.0 * tokens * weights + 4.0 * tokens * tokens * width)
    return Flops(forward, 3 * forward)


def head_flops(
    head: LabelHead, num_queries: int, num_positives: int, *, frozen_queries: bool = False
) -> Flops:
    """Operations of the label head: the logits of all labels that a step scores, and its network.

    Args:
      head: The label head.
      num_queries: Queries of a batch.
      num_positives: Labels of all these queries together.
      frozen_queries: Whether the vectors of queries need no gradient.
    """
    scored = head.num_labels
    if head.num_sampled:
        scored = min(scored, head.num_sampled + num_positives)
    # The prefixes of a query are queries of their own, padded with zeros.
    logits = 2.0 * num_queries * (1 + len(head.widths)) * scored * head.width
    layer = 2.0 * num_queries * head.width * head.mlp_width  # One of two layers of the same size.
    return Flops(logits + 2 * layer, 3 * logits + (5 if frozen_queries else 6) * layer)


def similarity_flops(num_queries: int, num_labels: int, width: int, matrices: int) -> Flops:
    """Operations of score matrices.

    Args:
      num_queries: Rows of a matrix.
      num_labels: Columns of a matrix.
      width: Width of the vectors, or the sum of the widths at which they are compared; both sides
        need gradients.
      matrices: Number of matrices.
    """
    forward = 2.0 * matrices * num_queries * num_labels * width
    return Flops(forward, 3 * forward)


class Estimate(NamedTuple):
    """Operations of a run.

    Attributes:
      steps: Training steps.
      step: Floating-point operations of a step over all devices.
    """

    steps: int
    step: float

    def hours(self, flops_per_s: float) -> float:
        """Hours at a given number of operations per second."""
        return self.steps * self.step / flops_per_s / 3600


def estimate(config: Config, num_queries: int, length: int) -> Estimate:
    """Operations of a run on a published tower, without data, weights or devices.

    All texts are counted at their maximum length and all items with all their images, so they are
    an upper bound. Communication, evaluation and clustering are not counted.

    Args:
      config: Of the run.
      num_queries: Training queries.
      length: Maximum number of tokens of a text.

    Raises:
      InputError: If the tower is none of `published_towers`.
    """
    tower = published_towers.config_of(config.model.pretrained.rsplit("/", 1)[-1])
    num_images, size = config.model.num_images, config.batch.size
    changes = {"image_width": 1152 if num_images else 0}
    if isinstance(tower, DecoderConfig):
        changes["lora_rank"] = config.lora.rank
        length += PROMPT
    tower = dataclasses.replace(tower, **changes)
    lengths = np.full(2 * size, length + num_images)
    total = tower_flops(tower, lengths, 2 * size * num_images)
    compared = sum({*config.loss.widths, tower.width})
    total += similarity_flops(size, size, compared, 2 if config.labels.prototypes else 1)
    if config.labels.prototypes:
        labels = config.labels
        combiner = Combiner(labels.num_heads, labels.mlp_width, labels.dropout)
        total += combiner_flops(combiner, size, tower.width)
    return Estimate(config.loop.epochs * -(-num_queries // size), total.step)


def describe_hours(config: Config, num_queries: int, length: int) -> str:
    """A sentence about the training time on one H100; empty if the tower is not a published one."""
    try:
        found = estimate(config, num_queries, length)
    except InputError:
        return ""
    hours = found.hours(EFFICIENCY * accelerators.KNOWN[DEVICE].peak_flops)
    return (
        f"training takes about {hours:.1f} h on one {DEVICE} (estimated from counted operations "
        f"at {100 * EFFICIENCY:.0f} % of its peak)"
    )
