"""Batches of queries: every item once, few sizes and shapes."""

import numpy as np
import pytest

from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items, Ragged, Texts
from vixml_jax.serving.batching import BatchPlanner


def make_items(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.repeat(np.arange(len(lengths)) + 1, lengths).astype(np.int32)
    no_texts = Texts(np.zeros(0, np.uint8), np.zeros(len(lengths) + 1, np.int64))
    return Items(no_texts, Ragged(tokens, offsets), None)


def make_planner(num_shards):
    return BatchPlanner(
        num_shards=num_shards, row_width=32, layout=Layout(), mean_tokens=6.0, max_tokens=16
    )


@pytest.mark.parametrize(
    "num_shards,sizes", [(1, [1, 4, 16, 64, 128, 256]), (3, [3, 6, 18, 66, 129, 258])]
)
def test_sizes_are_multiples_of_the_shards(num_shards, sizes):
    planner = make_planner(num_shards)
    assert planner.sizes == sizes
    assert planner.widths == [6, 9, 16]
    assert [planner.size_for(count) for count in (1, sizes[1], sizes[1] + 1, 9999)] == [
        sizes[0], sizes[1], sizes[2], sizes[5],
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 256, 257, 700])
def test_batches_cover_all_items_once(count):
    batches = list(make_planner(2).batches(count))
    rows = [row for batch in batches for row in range(batch.rows.start, batch.rows.stop)]
    assert rows == list(range(count))
    assert all(batch.count <= batch.size for batch in batches)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_packed_batches_hold_all_tokens_in_few_shapes(num_shards):
    rng, planner = np.random.default_rng(0), make_planner(num_shards)
    shapes: dict[int, set] = {}
    for count in [1, 3, 4, 7, 12, 50, 64, 100, 200, 300] * 6:
        items = make_items(rng.integers(1, rng.choice([8, 17]), count))
        for batch in planner.batches(len(items)):
            packed = planner.pack(items, batch)
            shapes.setdefault(batch.size, set()).add(packed.tokens.shape)
            expected = np.diff(items.tokens.offsets)[batch.rows]
            counts = np.bincount(packed.segments[packed.segments >= 0], minlength=batch.count)
            np.testing.assert_array_equal(counts, expected)
    assert shapes.keys() == set(planner.sizes)
    for size, found in shapes.items():
        assert len(found) <= (3 if size == num_shards else 2)
