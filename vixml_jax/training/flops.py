"""How many floating-point operations a step needs, counted from the sizes of the model.

A multiplication and an addition are two. Counted are the products of matrices: dense layers,
adapters, attention within the true lengths of the items, the combiner, the similarities. Not
counted are embeddings, norms and whatever else is linear in the width, padding, and what is
computed twice to save memory; so the share of a device's peak is that of useful work (MFU, arXiv
2204.02311).

A product costs as much again for the gradient of its input, and as much for that of its weight.
Frozen weights have no gradient; pictures, which are no parameters, have none either.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.labels.prototypes import Combiner
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.structs import Batch, PackedItems


class Flops(NamedTuple):
    """Operations.

    Attributes:
      forward: Of the forward pass.
      step: Of forward and backward pass.
    """

    forward: float
    step: float

    def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]
        return Flops(self.forward + other.forward, self.step + other.step)


def step_flops(config: TowerConfig, combiner: Combiner | None, batch: Batch) -> float:
    """Operations of one training step.

    Args:
      config: The tower's sizes.
      combiner: The prototype network, if there is one.
      batch: On the host.
    """
    queries, labels = (
        int(np.count_nonzero(ids >= 0)) for ids in (batch.query_ids, batch.label_ids)
    )
    pictures = int(np.count_nonzero(batch.items.image_at >= 0))
    total = tower_flops(config, item_lengths(batch.items), pictures)
    total += similarity_flops(queries, labels, config.width, 1 if combiner is None else 2)
    if combiner is not None:
        total += combiner_flops(combiner, labels, config.width)
    return total.step


def item_lengths(items: PackedItems) -> Int[np.ndarray, " n"]:
    """Positions of each item, 0 for those that are not there: text, pictures, prompt."""
    segments = np.asarray(items.segments)
    return np.bincount(segments[segments >= 0])


def tower_flops(config: TowerConfig, lengths: Int[np.ndarray, " n"], num_pictures: int) -> Flops:
    """Of a tower.

    Under adapters all of its weights are taken for frozen, and every position for one whose
    gradient is needed, though the first layer's is not where there are no pictures.

    Args:
      config: Its sizes.
      lengths: Positions of each item.
      num_pictures: Projected into it.
    """
    positions = float(np.sum(lengths))
    maps, adapted = _maps(config)
    weights = sum(inputs * outputs for inputs, outputs in maps.values())
    rank = getattr(config, "lora_rank", 0)
    low_rank = sum(rank * sum(maps[name]) for name in adapted)
    dense = 2.0 * positions * config.num_layers * weights
    adapters = 2.0 * positions * config.num_layers * low_rank
    attention = _attention(config, lengths)
    pictures = 2.0 * num_pictures * config.image_width * config.width
    return Flops(
        dense + adapters + attention + pictures,
        (2 if rank else 3) * dense + 3 * (adapters + attention) + 2 * pictures,
    )


def _maps(config: TowerConfig) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Inputs and outputs of the dense layers of a block, and which have adapters."""
    d, m = config.width, config.mlp_width
    if isinstance(config, BertConfig):
        maps = dict.fromkeys(("query", "key", "value", "out"), (d, d))
        return maps | {"up": (d, m), "down": (m, d)}, ()
    q, kv = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    maps = {
        "query": (d, q), "key": (d, kv), "value": (d, kv), "out": (q, d),
        "gate": (d, m), "up": (d, m), "down": (m, d),
    }  # fmt: skip
    return maps, config.lora_maps if config.lora_rank else ()


def _attention(config: TowerConfig, lengths: Int[np.ndarray, " n"]) -> float:
    """Scores and weighted sums of all layers: two products an entry of each pair seen."""
    if isinstance(config, BertConfig):
        return 4.0 * config.num_layers * config.width * seen_pairs(lengths, causal=False)
    sliding = int(np.count_nonzero(config.slides))
    pairs = (config.num_layers - sliding) * seen_pairs(lengths, causal=config.causal)
    if sliding:
        pairs += sliding * seen_pairs(lengths, causal=config.causal, window=config.window)
    return 4.0 * config.num_heads * config.head_width * pairs


def seen_pairs(lengths: Int[np.ndarray, " n"], *, causal: bool, window: int = 0) -> float:
    """Pairs of positions of one item of which one sees the other.

    Args:
      lengths: Positions of each item.
      causal: Whether a position sees only itself and those before it.
      window: Only those nearer than this; 0: all.
    """
    n = np.asarray(lengths, np.float64)
    near = np.minimum(n, window) if window else n
    # Itself and those before it: 1, 2, ... up to the window, then the window's size each time.
    before = near * (near + 1) / 2 + (n - near) * near
    return float(np.sum(before if causal else 2 * before - n))


def combiner_flops(combiner: Combiner, num_labels: int, width: int) -> Flops:
    """Of the prototype network: three tokens a label, all of it trained."""
    weights = 4 * width * width + 2 * width * combiner.mlp_width
    forward = num_labels * (2.0 * 3 * weights + 4.0 * 3 * 3 * width)
    return Flops(forward, 3 * forward)


def similarity_flops(num_queries: int, num_labels: int, width: int, matrices: int) -> Flops:
    """Of matrices of scores, queries by labels, with gradients to both sides."""
    forward = 2.0 * matrices * num_queries * num_labels * width
    return Flops(forward, 3 * forward)
