"""Items to packed rows: pictures, then text, several items to a row of fixed width."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.data.store import Items, Ragged, ranges
from vixml_jax.structs import PackedItems


class RowSizes(NamedTuple):
    """How many rows a block may have: few sizes, so that few programs are compiled."""

    least: int = 1
    step: int = 1

    def fit(self, rows: int) -> int:
        """The smallest size that holds `rows`."""
        return self.least + -(-max(0, rows - self.least) // self.step) * self.step

    @staticmethod
    def expected(mean_length: float, *, batch_size: int, width: int, blocks: int = 1) -> "RowSizes":
        """Sizes around what batches need: about a twelfth apart, none below the mean.

        Args:
          mean_length: Positions of an item (of a query and a label together, where both are
            packed).
          batch_size: Items of all blocks (or pairs of them).
          width: Positions of a row.
          blocks: Shares of a batch.
        """
        rows = max(1, round(mean_length * batch_size / blocks / width))
        return RowSizes(rows, max(1, round(rows / 12)))


def pack(
    items: Items,
    ids: Int[np.ndarray, " n"],
    *,
    width: int,
    num_images: int,
    rows: RowSizes = RowSizes(),
    blocks: int = 1,
) -> PackedItems:
    """Packs items, each unbroken in one row: its first pictures, then its tokens.

    Picture j of an item has position j and its token t position `num_images + t`, also where
    pictures are missing (as the paper's encoders count).

    Args:
      items: Where tokens and pictures are.
      ids: Rows of `items`; item k of the batch is `ids[k]`. -1 takes no place.
      width: Positions of a row. Text is cut to `width - num_images`.
      num_images: Pictures of an item at most; 0: text only.
      rows: Of a block.
      blocks: The batch falls into this many equal runs, each packed into its own equal number of
        rows: the share of a device.

    Returns:
      numpy arrays; picture j of item k in row `k * num_images + j` of `images`, float16, zero
      where it is absent; no rows where there are no pictures at all.
    """
    real = ids >= 0
    at = np.where(real, ids, 0)
    starts, lengths = _spans(items.tokens, at)
    lengths = np.where(real, np.minimum(lengths, width - num_images), 0)
    if items.images is None or num_images == 0:
        pictures = np.zeros(len(ids), np.int64)
        images = np.zeros((0, 1), np.float16)
    else:
        first, pictures = _spans(items.images, at)
        pictures = np.where(real, np.minimum(pictures, num_images), 0)
        images = np.zeros((len(ids) * num_images, items.images.values.shape[1]), np.float16)
        slots = ranges(np.arange(len(ids)) * num_images, pictures)
        images[slots] = items.images.values[ranges(first, pictures)]
    sizes = lengths + pictures

    shares = sizes.reshape(blocks, -1)
    row, offset, used = _fill_blocks(shares, width, rows)
    row = (row + np.arange(blocks)[:, None] * used).reshape(-1)
    begin = row * width + offset.reshape(-1)  # First position of each item in the flat rows.

    total = blocks * used * width
    tokens, segments, positions, image_at = np.zeros((4, total), np.int32)
    segments[:] = image_at[:] = -1
    put = ranges(begin, pictures)
    image_at[put] = ranges(np.arange(len(ids)) * num_images, pictures)
    positions[put] = ranges(np.zeros(len(ids), np.int64), pictures)
    segments[put] = np.repeat(np.arange(len(ids)), pictures)
    put = ranges(begin + pictures, lengths)
    tokens[put] = items.tokens.values[ranges(starts, lengths)]
    positions[put] = ranges(np.full(len(ids), num_images), lengths)
    segments[put] = np.repeat(np.arange(len(ids)), lengths)
    shape = (-1, width)
    return PackedItems(
        tokens.reshape(shape),
        segments.reshape(shape),
        positions.reshape(shape),
        image_at.reshape(shape),
        images,
    )


def join(
    first: PackedItems, second: PackedItems, num_first: int, *, rows: RowSizes, blocks: int = 1
) -> PackedItems:
    """Two packed sides as one: item j of the second becomes item `num_first + j`.

    Args:
      first: Rows of both sides are packed in the same number of blocks.
      second: Its pictures, if both have some, are as wide.
      num_first: Items of the first.
      rows: Of a block; what is missing is empty.
      blocks: A block of the whole is a block of the first, then one of the second.
    """
    shift = len(first.images)
    second = second._replace(
        segments=np.where(second.segments >= 0, second.segments + num_first, -1),
        image_at=np.where(second.image_at >= 0, second.image_at + shift, -1),
    )
    images = [side.images for side in (first, second) if len(side.images)]
    found = (len(first.tokens) + len(second.tokens)) // blocks
    missing = rows.fit(found) - found

    def concatenate(one: np.ndarray, other: np.ndarray, empty: int) -> np.ndarray:
        parts = [x.reshape(blocks, -1, x.shape[1]) for x in (one, other)]
        parts.append(np.full((blocks, missing, one.shape[1]), empty, one.dtype))
        return np.concatenate(parts, axis=1, dtype=one.dtype).reshape(-1, one.shape[1])

    return PackedItems(
        tokens=concatenate(first.tokens, second.tokens, 0),
        segments=concatenate(first.segments, second.segments, -1),
        positions=concatenate(first.positions, second.positions, 0),
        image_at=concatenate(first.image_at, second.image_at, -1),
        images=np.concatenate(images) if images else first.images,
    )


def _spans(ragged: Ragged, at: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.asarray(ragged.offsets[at])
    return starts, np.asarray(ragged.offsets[at + 1]) - starts


def _fill_blocks(
    sizes: Int[np.ndarray, "x n"], width: int, rows: RowSizes
) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and offset of each item within its block, and the rows of a block."""
    row, offset, used = zip(*(_fill(share, width) for share in sizes), strict=True)
    return np.stack(row), np.stack(offset), rows.fit(max(used))


def _fill(sizes: Int[np.ndarray, " n"], width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit, largest first: an item goes where the least room is left that holds it.

    Items of one size are placed together: a row takes as many as it holds before a row with more
    room is touched.

    Returns:
      Row and offset of each item, and how many rows are used.
    """
    counts = np.bincount(sizes, minlength=width + 1).tolist()
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # By the room left in them.
    rows: list[int] = []
    offsets: list[int] = []
    used = 0
    for size in range(width, 0, -1):
        missing, room = counts[size], size
        while missing:
            while room < width and not open_rows[room]:
                room += 1
            if not open_rows[room]:
                open_rows[width].append(used)
                used += 1
            at = open_rows[room].pop()
            took = min(room // size, missing)
            rows += [at] * took
            offsets += range(width - room, width - room + took * size, size)
            open_rows[room - took * size].append(at)
            missing -= took
    row, offset = np.zeros((2, len(sizes)), np.int64)
    order = np.argsort(-sizes, kind="stable")[: len(rows)]
    row[order], offset[order] = rows, offsets
    return row, offset, used
