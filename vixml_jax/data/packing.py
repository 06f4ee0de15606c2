"""Items to packed rows: prompt, text and pictures, several items to a row of fixed width."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vixml_jax.data import mapped_rows
from vixml_jax.data.store import Items, ranges
from vixml_jax.structs import PackedItems

# "text", "images", or the tokens of a piece of the prompt.
Part = str | tuple[int, ...]


class RowSizes(NamedTuple):
    """How many rows a block may have: few sizes, so that few programs are compiled."""

    least: int = 1
    step: int = 1

    def fit(self, rows: int) -> int:
        """The smallest size that holds `rows`."""
        return self.least + -(-max(0, rows - self.least) // self.step) * self.step

    @staticmethod
    def expected(
        mean_length: float, *, batch_size: int, width: int, blocks: int = 1, chunk: int = 0
    ) -> "RowSizes":
        """Sizes around what batches need: about a twelfth apart, none below the mean.

        Args:
          mean_length: Positions of an item (of a query and a label together, where both are
            packed).
          batch_size: Items of all blocks (or pairs of them).
          width: Positions of a row.
          blocks: Shares of a batch.
          chunk: Rows that all sizes are a multiple of; 0: any.
        """
        rows = max(1, round(mean_length * batch_size / blocks / width))
        if chunk:
            return RowSizes(-(-rows // chunk) * chunk, chunk)
        return RowSizes(rows, max(1, round(rows / 12)))


class Layout(NamedTuple):
    """How the sequence of an item is written: prompt pieces, its text, its pictures.

    The default is that of the paper's encoders: pictures, then text, whose positions begin where
    those of all pictures would end.

    Attributes:
      num_images: Pictures of an item at most; 0: text only.
      seen: The parts of an item with pictures, in order.
      unseen: Those of an item without.
      reserve_images: Whether text positions leave room for pictures that are missing; else
        positions count what is there.
      trim: Tokens of a prepared text left out at its start and at its end: what the tokenizer
        added, where the prompt says it.
    """

    num_images: int = 0
    seen: tuple[Part, ...] = ("images", "text")
    unseen: tuple[Part, ...] = ("text",)
    reserve_images: bool = True
    trim: tuple[int, int] = (0, 0)

    @property
    def overhead(self) -> int:
        """Positions that an item takes beside its text, at most."""
        return self.num_images + max(_prompt_length(self.seen), _prompt_length(self.unseen))


def _prompt_length(parts: tuple[Part, ...]) -> int:
    return sum(len(part) for part in parts if not isinstance(part, str))


class _Spans(NamedTuple):
    """Where the parts of items are, and how long: arrays [n]; lengths 0 where there is no item."""

    text_at: Int[np.ndarray, " n"]
    text: Int[np.ndarray, " n"]
    images_at: Int[np.ndarray, " n"]
    images: Int[np.ndarray, " n"]
    prompt: Int[np.ndarray, " n"]


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


def item_lengths(
    items: Items,
    ids: Int[np.ndarray, " n"] | None = None,
    *,
    width: int,
    layout: Layout,
    hidden: Bool[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " n"]:
    """Positions that items take in a packed row, 0 for id -1; by default of all items."""
    ids = np.arange(len(items)) if ids is None else ids
    spans = _spans(items, ids, width, layout, hidden)
    return spans.text + spans.images + spans.prompt


def deal(lengths: Int[np.ndarray, " n"], blocks: int) -> Int[np.ndarray, " n"]:
    """An order in which equal runs of items are about equally long together.

    Args:
      lengths: Of the items.
      blocks: How many runs; divides the number of items.

    Returns:
      The items, run after run.
    """
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, blocks)
    rounds[1::2] = rounds[1::2, ::-1]  # Who came last comes first.
    return rounds.T.reshape(-1)


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
    """Packs items, each unbroken in one row, as `layout` says.

    Args:
      items: Where tokens and pictures are.
      ids: Rows of `items`; item k of the batch is `ids[k]`. -1 takes no place.
      width: Positions of a row. Text is cut to `width - layout.overhead`.
      layout: Of an item.
      rows: Of a block.
      blocks: The batch falls into this many equal runs, each packed into its own equal number of
        rows: the share of a device.
      read: The blocks whose rows are wanted, ascending; None: all. Of the others only lengths are
        read, so that all who pack parts of a batch agree.
      hidden: Items whose pictures are left out; None: none.

    Returns:
      numpy arrays, rows and pictures of the wanted blocks, numbered as in the whole: picture j of
      item k is row `k * num_images + j` of all `images`, float16, zero where it is absent; no rows
      where there are no pictures at all.
    """
    spans = _spans(items, ids, width, layout, hidden)
    sizes = spans.text + spans.images + spans.prompt
    row, offset, used = _fill_blocks(sizes.reshape(blocks, -1), width, rows)
    wanted = np.arange(blocks) if read is None else np.asarray(read)
    numbers = np.arange(len(ids)).reshape(blocks, -1)[wanted].reshape(-1)
    row = (row[wanted] + np.arange(len(wanted))[:, None] * used).reshape(-1)
    begin = row * width + offset[wanted].reshape(-1)  # First position of each in the flat rows.
    ids, sizes, spans = ids[numbers], sizes[numbers], _Spans(*(x[numbers] for x in spans))
    slots = np.arange(len(ids)) * layout.num_images  # Rows of `images` of each item, here.
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
        at = begin[chosen]  # Where the next part goes.
        here = ids[chosen] >= 0
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
                lengths = np.where(here, len(part), 0)
                tokens[ranges(at, lengths)] = np.tile(part, int(here.sum()))
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
    """Two packed sides as one: item j of the second becomes item `num_first + j`.

    Args:
      first: Rows of both sides are packed in the same number of blocks.
      second: Its pictures, if both have some, are as wide.
      num_first: Items of the first.
      rows: Of a block; what is missing is empty.
      blocks: That are here. A block of the whole is a block of the first, then one of the second;
        so are its pictures.
    """
    of_first, of_second = (len(side.images) // blocks for side in (first, second))

    def shift(image_at: np.ndarray, own: int, before: int, other: int) -> np.ndarray:
        moved = image_at + image_at // max(own, 1) * other + before
        return np.where(image_at >= 0, moved, -1)

    first = first._replace(image_at=shift(first.image_at, of_first, 0, of_second))
    second = second._replace(
        segments=np.where(second.segments >= 0, second.segments + num_first, -1),
        image_at=shift(second.image_at, of_second, of_first, of_first),
    )
    images = [x.reshape(blocks, -1, x.shape[1]) for x in (first.images, second.images) if len(x)]
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
        images=np.concatenate(images, axis=1).reshape(-1, images[0].shape[2])
        if images
        else first.images,
    )


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
