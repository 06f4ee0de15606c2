"""Packing speed in items per second, and the fraction of positions left empty.

    python -m vixml_jax.benchmarks.packing [--data=DIR] [--tower=qwen2.5-0.5b] [--images=3]

Compared with padding the same batches to 32 positions per item, as the paper's program does:
faster to write, but most positions that a tower then reads are empty.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from absl import flags
from jaxtyping import Int

from vixml_jax import command_line
from vixml_jax.benchmarks import train_step
from vixml_jax.data import packing
from vixml_jax.data.store import Items, ranges

PADDED = 32


def pad(items: Items, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n t"]:
    """Tokens truncated or padded with -1 to 32 positions, one item per row."""
    starts = np.asarray(items.tokens.offsets[ids])
    lengths = np.minimum(np.asarray(items.tokens.offsets[ids + 1]) - starts, PADDED)
    tokens = np.full((len(ids), PADDED), -1, np.int32)
    tokens[np.arange(PADDED) < lengths[:, None]] = items.tokens.values[ranges(starts, lengths)]
    return tokens


def measure(
    items: Items, *, batch: int, width: int, layout: packing.Layout
) -> dict[str, tuple[float, float]]:
    """Seconds of a pass over shuffled items, and fraction of empty positions, by program."""
    order = np.random.default_rng(0).permutation(len(items))
    batches = [ids for ids in np.array_split(order, max(1, len(order) // batch)) if len(ids)]
    lengths = packing.item_lengths(items, width=width, layout=layout)
    rows = packing.RowSizes.expected(float(np.mean(lengths)), batch_size=batch, width=width)

    def packed() -> Iterable[np.ndarray]:
        for ids in batches:
            one = packing.pack(items, ids, width=width, layout=layout, rows=rows)
            yield one.segments < 0

    def padded() -> Iterable[np.ndarray]:
        for ids in batches:
            yield pad(items, ids) < 0

    return {"packed": _timed(packed), "padded to 32, text only": _timed(padded)}


def _timed(program: Callable[[], Iterable[np.ndarray]]) -> tuple[float, float]:
    start, empty, total = time.perf_counter(), 0, 0
    for mask in program():
        empty, total = empty + int(np.count_nonzero(mask)), total + mask.size
    return time.perf_counter() - start, empty / total


def main(argv: Sequence[str]) -> None:
    """Prints one line for each program and side."""
    del argv
    values = flags.FLAGS
    settings = {"data": values.data, "images": values.images}
    dataset = train_step.data_of(settings, full=False)
    layout = train_step.layout_of(values.tower, values.images)
    for side in ("train", "labels"):
        items = getattr(dataset, side)
        found = [
            measure(items, batch=values.batch, width=values.width, layout=layout)
            for _ in range(values.rounds)
        ]
        for name in found[0]:
            seconds = statistics.median(one[name][0] for one in found)
            print(
                f"{side:7s} {name:25s} {len(items) / seconds:12,.0f} items/s "
                f"{found[0][name][1]:7.1%} empty"
            )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("data", "glyphs", "Prepared data to pack, or 'glyphs'.")
    flags.DEFINE_integer("batch", 512, "Items per batch.", lower_bound=1)
    flags.DEFINE_string(
        "tower", "all-minilm-l6", "Tower whose sequence layout is used (decoders have a prompt)."
    )
    flags.DEFINE_integer("images", 0, "Images per item.", lower_bound=0)
    flags.DEFINE_integer("width", 64, "Positions per row.", lower_bound=48)
    flags.DEFINE_integer("rounds", 5, "Passes over the data.", lower_bound=1)


if __name__ == "__main__":
    command_line.launch(main, define_flags)
