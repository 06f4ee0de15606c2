"""Batches of queries: every item once, few shapes, little padding."""

import numpy as np
import pytest

from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items, Ragged, Texts
from vixml_jax.serving.batching import BatchPlanner, Shape


def make_items(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.repeat(np.arange(len(lengths)) + 1, lengths).astype(np.int32)
    no_texts = Texts(np.zeros(0, np.uint8), np.zeros(len(lengths) + 1, np.int64))
    return Items(no_texts, Ragged(tokens, offsets), None)


def make_planner(num_shards):
    return BatchPlanner(
        num_shards=num_shards, row_width=32, layout=Layout(), mean_tokens=6.0, max_tokens=16
    )


@pytest.mark.parametrize("num_shards,max_size", [(1, 256), (3, 258)])
def test_shapes_hold_a_full_batch_of_longest_texts(num_shards, max_size):
    planner = make_planner(num_shards)
    assert planner.max_size == max_size
    assert planner.shapes[:3] == [Shape(1, 6, 1), Shape(1, 9, 1), Shape(1, 16, 1)]
    last = planner.shapes[-1]  # Two texts of 16 tokens in a row.
    assert last == Shape(max_size // num_shards // 2, 32, max_size // num_shards)
    batch = planner.pack(make_items([16] * max_size), slice(0, max_size))
    assert batch.packed.tokens.shape == (num_shards * last.rows, 32)


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 256, 257, 700])
def test_batches_cover_all_items_once(count):
    batches = list(make_planner(2).batches(count))
    rows = [row for batch in batches for row in range(batch.start, batch.stop)]
    assert rows == list(range(count))
    assert all(batch.stop - batch.start <= 256 for batch in batches)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_packed_batches_hold_all_tokens_in_few_shapes(num_shards):
    rng, planner = np.random.default_rng(), make_planner(num_shards)
    shapes = {(num_shards * x.rows, x.width): num_shards * x.size for x in planner.shapes}
    for count in [1, 3, 4, 7, 12, 50, 64, 100, 200, 300] * 6:
        items = make_items(rng.integers(1, rng.choice([2, 8, 17]), count))
        for rows in planner.batches(len(items)):
            packed, size, at = planner.pack(items, rows)
            assert shapes[packed.tokens.shape] == size
            expected = np.zeros(size, np.int64)
            expected[at] = np.diff(items.tokens.offsets)[rows]
            counts = np.bincount(packed.segments[packed.segments >= 0], minlength=size)
            np.testing.assert_array_equal(counts, expected)
            # Every token is one of the item whose vector is read at this place.
            owner = np.zeros(size, np.int64)
            owner[at] = np.arange(rows.start, rows.stop) + 1
            used = packed.segments >= 0
            np.testing.assert_array_equal(packed.tokens[used], owner[packed.segments[used]])
            # Item k is on device k % shards.
            row, _ = np.nonzero(used)
            device = row // (len(packed.tokens) // num_shards)
            np.testing.assert_array_equal(
                device, (packed.tokens[used] - 1 - rows.start) % num_shards
            )


def test_padding_is_at_most_a_half_of_what_the_rows_need():
    rng, planner = np.random.default_rng(), make_planner(1)
    for count in [5, 16, 16, 40, 128, 250] * 10:
        lengths = rng.integers(3, 10, count)  # Six on average.
        packed = planner.pack(make_items(lengths), slice(0, count)).packed
        rows = -(-int(lengths.sum()) // 32)
        assert len(packed.tokens) <= max(rows + 2, 1.5 * (rows + 1))
