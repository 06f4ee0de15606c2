"""Packs any number of queries into batches of few shapes, so that few programs are compiled."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.data import packing
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items
from vixml_jax.structs import PackedItems

MAX_SIZE = 256  # Items of a batch.
_SPARE = 2.0  # Items that a batch has room for, in terms of those of mean length that fill it.


class Shape(NamedTuple):
    """The shape of a batch, with a compiled program of its own.

    Attributes:
      rows: Packed rows on each device.
      width: Positions of a row.
      size: Items that it has room for on each device.
    """

    rows: int
    width: int
    size: int


class PackedBatch(NamedTuple):
    """Items packed for the devices.

    Attributes:
      packed: The rows.
      size: Items that they have room for on all devices together.
      at: Where among these the items are.
    """

    packed: PackedItems
    size: int
    at: Int[np.ndarray, " b"]


class BatchPlanner:
    """Decides how items are split into batches and packed into rows.

    Attributes:
      max_size: Items of a batch at most.
      shapes: All shapes of batches. First those with a single item on each device, whose rows are
        as narrow as a text of mean length allows, one of 1.5 times the mean length, and one of the
        maximum length; then those with 1, 2, ... rows of full width, up to what `max_size` items of
        maximum length need.
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
        largest = -(-MAX_SIZE // num_shards)  # Items on a device.
        self.max_size = largest * num_shards
        longest = min(row_width, max_tokens + layout.overhead)
        mean, more = (
            min(longest, round(factor * mean_tokens) + layout.overhead) for factor in (1, 1.5)
        )
        self._narrow = [Shape(1, width, 1) for width in sorted({mean, more, longest})]
        self._wide = []
        most = -(-largest // (row_width // longest))
        for rows in _row_counts(most):
            room = max(2, round(_SPARE * rows * row_width / mean))
            size = largest if rows == most else min(largest, room)
            self._wide.append(Shape(rows, row_width, size))
        self.shapes = self._narrow + self._wide

    def batches(self, count: int) -> Iterator[slice]:
        """Yields the rows of each batch of `count` items."""
        for start in range(0, count, self.max_size):
            yield slice(start, min(start + self.max_size, count))

    def pack(self, items: Items, rows: slice) -> PackedBatch:
        """Packs a batch of items in the smallest shape that holds them.

        Args:
          items: Any number.
          rows: The items of the batch, at most `max_size`.
        """
        ids = np.arange(rows.start, rows.stop)
        shards, layout = self._num_shards, self._layout
        order = np.arange(len(ids))
        shard, place = order % shards, order // shards  # So that all devices have as many items.
        each = -(-len(ids) // shards)
        if each <= 1:
            offsets = items.tokens.offsets[rows.start : rows.stop + 1]
            longest = np.diff(offsets).max(initial=0) - sum(layout.trim) + layout.overhead
            shape = next((x for x in self._narrow if longest <= x.width), self._narrow[-1])
        else:
            lengths = np.zeros((shards, each), np.int64)
            lengths[shard, place] = packing.item_lengths(
                items, ids, width=self._row_width, layout=layout
            )
            needed = packing.num_rows(lengths, self._row_width)
            shape = next(x for x in self._wide if x.rows >= needed and x.size >= each)
        at = shard * shape.size + place
        in_batch = np.full(shards * shape.size, -1)
        in_batch[at] = ids
        return PackedBatch(self._packed(items, in_batch, shape), len(in_batch), at)

    def empty(self, items: Items, shape: Shape) -> PackedBatch:
        """Returns a batch without items, which shows the arrays of a shape.

        Args:
          items: Any; whether they have images matters.
          shape: One of `shapes`.
        """
        ids = np.full(self._num_shards * shape.size, -1)
        return PackedBatch(self._packed(items, ids, shape), len(ids), ids[:0])

    def _packed(self, items: Items, ids: Int[np.ndarray, " b"], shape: Shape) -> PackedItems:
        """Items packed in a shape that holds them."""
        return packing.pack(
            items,
            ids,
            width=shape.width,
            layout=self._layout,
            blocks=self._num_shards,
            rows=packing.RowSizes(shape.rows),
        )


def _row_counts(most: int) -> Iterator[int]:
    """Yields 1 to 8, then powers of two and the numbers halfway between them, up to `most`."""
    rows = 1
    while rows < most:
        yield rows
        rows += 1 if rows < 8 else 1 << rows.bit_length() - 2
    yield most
