"""Packs any number of queries into batches of few shapes, so that few programs are compiled."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.data import packing
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items
from vixml_jax.structs import PackedItems

SIZES = (1, 4, 16, 64, 128, 256)  # Items per batch; one or two compiled programs each.


class Batch(NamedTuple):
    """Consecutive items that go through the tower together.

    Attributes:
      rows: Their rows among all items.
      size: Items to which the batch is padded, one of few sizes.
    """

    rows: slice
    size: int

    @property
    def count(self) -> int:
        """Items without padding."""
        return self.rows.stop - self.rows.start

    @property
    def padding(self) -> int:
        """Items of padding."""
        return self.size - self.count


class BatchPlanner:
    """Decides how items are split into batches and packed into rows.

    Attributes:
      sizes: Items per batch, ascending; multiples of the number of shards.
      widths: Positions of a row that holds one text of mean length, of 1.5 times the mean length,
        and of the maximum length; ascending.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        row_width: int,
        layout: Layout,
        mean_tokens: float,
        max_tokens: int,
    ):
        """Plans for the sizes of a model.

        Args:
          num_shards: Devices over which the rows of a batch are sharded.
          row_width: Positions of a packed row.
          layout: How the sequence of an item is written.
          mean_tokens: Tokens of a text, on average.
          max_tokens: Tokens after which texts are cut.
        """
        self._num_shards, self._row_width, self._layout = num_shards, row_width, layout
        self.sizes = sorted({-(-size // num_shards) * num_shards for size in SIZES})
        longest = min(row_width, max_tokens + layout.overhead)
        self.widths = [
            min(longest, round(factor * mean_tokens) + layout.overhead) for factor in (1, 1.5)
        ]
        self.widths.append(longest)

    def size_for(self, count: int) -> int:
        """Returns the smallest batch size that holds `count` items, at most the largest size."""
        return next((size for size in self.sizes if size >= count), self.sizes[-1])

    def batches(self, count: int) -> Iterator[Batch]:
        """Yields the batches of `count` items."""
        for start in range(0, count, self.sizes[-1]):
            stop = min(start + self.sizes[-1], count)
            yield Batch(slice(start, stop), self.size_for(stop - start))

    def pack(self, items: Items, batch: Batch) -> PackedItems:
        """Packs a batch of items into rows, of which there are two shapes per batch size.

        The first shape has rows for items of mean length, with a margin for chance and for unused
        ends of rows; the second for items of maximum length. Where each device gets a single item,
        the row is as narrow as one of `widths` allows.
        """
        ids: Int[np.ndarray, " b"] = np.full(batch.size, -1)
        ids[: batch.count] = np.arange(batch.rows.start, batch.rows.stop)
        per_shard = batch.size // self._num_shards
        width, layout = self._row_width, self._layout
        mean, *_, longest = self.widths
        if per_shard == 1:
            tokens = np.diff(items.tokens.offsets).max(initial=0) - sum(layout.trim)
            width = next((w for w in self.widths if tokens + layout.overhead <= w), longest)
            return packing.pack(items, ids, width=width, layout=layout, blocks=self._num_shards)
        most = -(-per_shard // (width // longest))
        expected = per_shard * mean * (1.1 + per_shard**-0.5) / width
        few = min(most, max(1, math.ceil(expected)))
        return packing.pack(
            items,
            ids,
            width=width,
            layout=layout,
            blocks=self._num_shards,
            rows=packing.RowSizes(few, max(1, most - few)),
        )
