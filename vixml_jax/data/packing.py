"""Packs items (prompt, text tokens and images) into rows of a fixed width, several to a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vixml_jax.data import mapped_rows
from vixml_jax.data.store import Items, Ragged, ranges
from vixml_jax.structs import PackedItems

# A part of an item: "text", "images", or the tokens of a piece of the prompt.
Part = str | tuple[int, ...]


class RowSizes(NamedTuple):
    """The numbers of rows that a block may have: few, so that few programs are compiled.

    Attributes:
      least: The smallest number.
      step: Difference between one number and the next.
    """

    least: int = 1
    step: int = 1

    def fit(self, rows: int) -> int:
        """The smallest size of at least `rows`."""
        return self.least + -(-max(0, rows - self.least) // self.step) * self.step

    @staticmethod
    def expected(
        mean_length: float, *, batch_size: int, width: int, blocks: int = 1, chunk: int = 0
    ) -> "RowSizes":
        """Sizes from the mean need of a batch upwards, about a twelfth of it apart.

        Args:
          mean_length: Mean number of positions of an item, or of a query and a label together
            where both are packed.
          batch_size: Items of all blocks together, or pairs of a query and a label.
          width: Positions of a row.
          blocks: Number of blocks of a batch.
          chunk: All sizes are multiples of this number of rows; 0: any size.
        """
        rows = max(1, round(mean_length * batch_size / blocks / width))
        if chunk:
            return RowSizes(-(-rows // chunk) * chunk, chunk)
        return RowSizes(rows, max(1, round(rows / 12)))


class Layout(NamedTuple):
    """The order of the parts of an item: pieces of the prompt, its text, its images.

    The default is that of the paper's encoders: images, then text, whose positions begin at
    `num_images`, however many images the item has.

    Attributes:
      num_images: Maximum number of images of an item; 0: text only.
      seen: The parts of an item with images, in order.
      unseen: The parts of an item without images, in order.
      reserve_images: Whether the positions of the text leave space for missing images; otherwise
        positions count the parts that are present.
      trim: Numbers of tokens dropped at the start and at the end of a prepared text: the special
        tokens of the tokenizer, where the prompt has its own.
    """

    num_images: int = 0
    seen: tuple[Part, ...] = ("images", "text")
    unseen: tuple[Part, ...] = ("text",)
    reserve_images: bool = True
    trim: tuple[int, int] = (0, 0)

    @property
    def overhead(self) -> int:
        """Maximum number of positions of an item in addition to its text."""
        return self.num_images + max(_prompt_length(self.seen), _prompt_length(self.unseen))


def _prompt_length(parts: tuple[Part, ...]) -> int:
    return sum(len(part) for part in parts if not isinstance(part, str))


class _Spans(NamedTuple):
    """Where the parts of items begin in the store, and their lengths; lengths are 0 for id -1."""

    text_at: Int[np.ndarray, " n"]
    text: Int[np.ndarray, " n"]  # Length.
    images_at: Int[np.ndarray, " n"]
    images: Int[np.ndarray, " n"]  # Length.
    prompt: Int[np.ndarray, " n"]  # Length of all pieces together.


def _spans(
    items: Items,
    ids: Int[np.ndarray, " n"],
    width: int,
    layout: Layout,
    hidden: Bool[np.ndarray, " n"] | None = None,
) -> _Spans:
    real = ids >= 0
    at = np.where(real, ids, 0)
    text_at = np.asarray(items.tokens.offsets[at]) + layout.trim[0]
    text = np.asarray(items.tokens.offsets[at + 1]) - text_at - layout.trim[1]
    text = np.where(real, np.clip(text, 0, width - layout.overhead), 0)
    images_at = images = np.zeros(len(ids), np.int64)
    if items.images is not None and layout.num_images:
        images_at = np.asarray(items.images.offsets[at])
        images = np.asarray(items.images.offsets[at + 1]) - images_at
        shown = real if hidden is None else real & ~hidden
        images = np.where(shown, np.minimum(images, layout.num_images), 0)
    seen, unseen = _prompt_length(layout.seen), _prompt_length(layout.unseen)
    prompt = np.where(real, np.where(images > 0, seen, unseen), 0)
    return _Spans(text_at, text, images_at, images, prompt)


def text_tokens(
    tokens: Ragged,
    ids: Int[np.ndarray, " n"],
    *,
    layout: Layout,
    length: int,
) -> Int[np.ndarray, "n t"]:
    """The first tokens of texts, each in a row of its own, without what `layout.trim` drops.

    Args:
      tokens: Tokens of all texts.
      ids: The texts; -1 for a row without tokens.
      layout: How an item is written.
      length: Tokens of a row, t.

    Returns:
      Token ids, int32; -1 behind the end of a text.
    """
    values, offsets = tokens
    real = ids >= 0
    at = np.where(real, ids, 0)
    start = np.asarray(offsets[at]) + layout.trim[0]
    count = np.asarray(offsets[at + 1]) - layout.trim[1] - start
    count = np.where(real, np.clip(count, 0, length), 0)
    result = np.full((len(ids), length), -1, np.int32)
    result[np.arange(length) < count[:, None]] = values[ranges(start, count)]
    return result


def item_lengths(
    items: Items,
    ids: Int[np.ndarray, " n"] | None = None,
    *,
    width: int,
    layout: Layout,
    hidden: Bool[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " n"]:
    """Number of positions of each item in a packed row.

    Args:
      items: Tokens and images.
      ids: Rows of `items`; -1 has length 0. None: all items.
      width: Positions of a row.
      layout: How an item is written.
      hidden: Items whose images are left out; None: none.
    """
    ids = np.arange(len(items)) if ids is None else ids
    spans = _spans(items, ids, width, layout, hidden)
    return spans.text + spans.images + spans.prompt


def balance(lengths: Int[np.ndarray, " n"], blocks: int) -> Int[np.ndarray, " n"]:
    """Orders items so that consecutive blocks of equal size have about equal total length.

    Args:
      lengths: Length of each item.
      blocks: Number of blocks; divides the number of items.

    Returns:
      The indices of the items, block after block.
    """
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, blocks)
    rounds[1::2] = rounds[1::2, ::-1]  # The block served last in one round is first in the next.
    return rounds.T.reshape(-1)


def num_rows(lengths: Int[np.ndarray, "x n"], width: int) -> int:
    """Number of rows that `pack` needs for the fullest of x blocks.

    Args:
      lengths: Length of each item; 0 takes no positions.
      width: Positions of a row.
    """
    return _fill_blocks(lengths, width, RowSizes())[2]


def pack(
    items: Items,
    ids: Int[np.ndarray, " n"],
    *,
    width: int,
    layout: Layout = Layout(),
    rows: RowSizes = RowSizes(),
    blocks: int = 1,
    read: Sequence[int] | None = None,
    hidden: Bool[np.ndarray, " n"] | None = None,
) -> PackedItems:
    """Packs items into rows, each item in consecutive positions of one row.

    Args:
      items: Tokens and images.
      ids: Rows of `items`; item k of the batch is `ids[k]`. An id of -1 takes no positions.
      width: Positions of a row. Text is truncated to `width - layout.overhead` tokens.
      layout: How an item is written.
      rows: Possible numbers of rows of a block.
      blocks: Number of blocks: equal runs of consecutive items, each packed into rows of its own.
        All blocks have the same number of rows, so that the batch can be sharded over devices.
      read: The blocks to return, ascending; None: all. Of the others only lengths are read, so
        that processes which pack different blocks of a batch agree on the number of rows.
      hidden: Items whose images are left out; None: none.

    Returns:
      numpy arrays with the rows and images of the blocks in `read`. Items and images are numbered
      as in the whole batch: image j of item k is row `k * num_images + j` of `images`, float16,
      and zero if it is absent. `images` has no rows if `items` or `layout` have no images.
    """
    spans = _spans(items, ids, width, layout, hidden)
    sizes = spans.text + spans.images + spans.prompt
    row, offset, used = _fill_blocks(sizes.reshape(blocks, -1), width, rows)
    wanted = np.arange(blocks) if read is None else np.asarray(read)
    numbers = np.arange(len(ids)).reshape(blocks, -1)[wanted].reshape(-1)
    row = (row[wanted] + np.arange(len(wanted))[:, None] * used).reshape(-1)
    begin = row * width + offset[wanted].reshape(-1)  # First position of each item, rows flat.
    ids, sizes, spans = ids[numbers], sizes[numbers], _Spans(*(x[numbers] for x in spans))
    slots = np.arange(len(ids)) * layout.num_images  # First row of each item in `images` below.
    if items.images is None or not layout.num_images:
        images = np.zeros((0, 1), np.float16)
    else:
        shape = (len(ids) * layout.num_images, items.images.values.shape[1])
        images = np.zeros(shape, np.float16)
        mapped_rows.copy_runs(items.images.values, spans.images_at, spans.images, images, slots)

    total = len(wanted) * used * width
    tokens, segments, positions, image_at = np.zeros((4, total), np.int32)
    segments[:] = image_at[:] = -1
    put = ranges(begin, sizes)
    segments[put] = np.repeat(numbers, sizes)
    positions[put] = ranges(np.zeros(len(ids), np.int64), sizes)
    with_images = spans.images > 0
    for parts, chosen in ((layout.seen, with_images), (layout.unseen, ~with_images)):
        at = begin[chosen]  # First position of the next part of each item.
        real = ids[chosen] >= 0
        for part in parts:
            if part == "text":
                lengths = spans.text[chosen]
                mapped_rows.copy_runs(
                    items.tokens.values, spans.text_at[chosen], lengths, tokens, at
                )
                if layout.reserve_images:
                    put = ranges(at, lengths)
                    positions[put] += np.repeat(layout.num_images - spans.images[chosen], lengths)
            elif part == "images":
                lengths = spans.images[chosen]
                first = numbers[chosen] * layout.num_images
                image_at[ranges(at, lengths)] = ranges(first, lengths)
            else:
                lengths = np.where(real, len(part), 0)
                tokens[ranges(at, lengths)] = np.tile(part, int(real.sum()))
            at = at + lengths
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
    """Joins two packed sides; item j of the second becomes item `num_first + j`.

    Args:
      first: Items packed in `blocks` blocks.
      second: Items packed in `blocks` blocks. If both sides have images, these are of equal width.
      num_first: Number of items of `first` in the whole batch.
      rows: Possible numbers of rows of a block of the result; it is padded with empty rows.
      blocks: Number of blocks in each side. A block of the result has the rows of a block of
        `first`, then those of a block of `second`; likewise its images.
    """
    images_first, images_second = (len(side.images) // blocks for side in (first, second))

    def shift(image_at: np.ndarray, own: int, other: int, before: int) -> np.ndarray:
        """Rows of images after the `other` images of each earlier block, and `before` more."""
        moved = image_at + image_at // max(own, 1) * other + before
        return np.where(image_at >= 0, moved, -1)

    first = first._replace(image_at=shift(first.image_at, images_first, images_second, 0))
    second = second._replace(
        segments=np.where(second.segments >= 0, second.segments + num_first, -1),
        image_at=shift(second.image_at, images_second, images_first, images_first),
    )
    images = [x.reshape(blocks, -1, x.shape[1]) for x in (first.images, second.images) if len(x)]
    used = (len(first.tokens) + len(second.tokens)) // blocks
    padding = rows.fit(used) - used

    def concatenate(a: np.ndarray, b: np.ndarray, empty: int) -> np.ndarray:
        parts = [x.reshape(blocks, -1, x.shape[1]) for x in (a, b)]
        parts.append(np.full((blocks, padding, a.shape[1]), empty, a.dtype))
        return np.concatenate(parts, axis=1, dtype=a.dtype).reshape(-1, a.shape[1])

    return PackedItems(
        tokens=concatenate(first.tokens, second.tokens, 0),
        segments=concatenate(first.segments, second.segments, -1),
        positions=concatenate(first.positions, second.positions, 0),
        image_at=concatenate(first.image_at, second.image_at, -1),
        images=np.concatenate(images, axis=1).reshape(-1, images[0].shape[2])
        if images
        else first.images,
    )


def _fill_blocks(
    sizes: Int[np.ndarray, "x n"], width: int, rows: RowSizes
) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and offset of each item within its block, and the number of rows of a block."""
    row, offset, used = zip(*(_fill(block, width) for block in sizes), strict=True)
    return np.stack(row), np.stack(offset), rows.fit(max(used))


def _fill(sizes: Int[np.ndarray, " n"], width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Places items by best fit, largest first: each goes to the fullest row that can hold it.

    Items of the same size are placed together: a row takes as many as it can hold before a row
    with more space is used.

    Returns:
      Row and offset of each item, and the number of rows used.
    """
    counts = np.bincount(sizes, minlength=width + 1).tolist()
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # By free positions.
    rows: list[int] = []
    offsets: list[int] = []
    used = 0
    for size in range(width, 0, -1):
        remaining, free = counts[size], size
        while remaining:
            while free < width and not open_rows[free]:
                free += 1
            if not open_rows[free]:
                open_rows[width].append(used)
                used += 1
            row_index = open_rows[free].pop()
            count = min(free // size, remaining)
            rows += [row_index] * count
            offsets += range(width - free, width - free + count * size, size)
            open_rows[free - count * size].append(row_index)
            remaining -= count
    row, offset = np.zeros((2, len(sizes)), np.int64)
    order = np.argsort(-sizes, kind="stable")[: len(rows)]
    row[order], offset[order] = rows, offsets
    return row, offset, used
