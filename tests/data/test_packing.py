"""Packing, sampling of positives and the input pipeline, on random items."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import sparse, stats

from vixml_jax.data import input_pipeline, packing, sampling
from vixml_jax.data.store import Items, PreparedDataset, Ragged


def random_items(rng, n, longest=12, image_width=0, max_images=3):
    lengths = rng.integers(1, longest + 1, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Ragged(rng.integers(1, 1000, offsets[-1]).astype(np.int32), offsets)
    images = None
    if image_width:
        counts = rng.integers(0, max_images + 1, n)
        at = np.concatenate([[0], np.cumsum(counts)])
        images = Ragged(rng.normal(size=(at[-1], image_width)).astype(np.float16), at)
    return Items([str(i) for i in range(n)], tokens, images)


def check(packed, items, ids, width, num_images):
    """Checks that each item is packed once, in consecutive positions: images, then tokens."""
    flat = packed.segments.reshape(-1)
    for k, i in enumerate(ids):
        at = np.flatnonzero(flat == k)
        if i < 0:
            assert not len(at)
            continue
        tokens = items.tokens.values[items.tokens.offsets[i] : items.tokens.offsets[i + 1]]
        tokens = tokens[: width - num_images]
        item_images = np.zeros((0, 1))
        if items.images is not None:
            item_images = items.images.values[items.images.offsets[i] : items.images.offsets[i + 1]]
            item_images = item_images[:num_images]
        assert len(at) == len(item_images) + len(tokens)
        assert len(at) == 0 or at[-1] - at[0] == len(at) - 1
        assert len(set(at // width)) <= 1
        image_at = packed.image_at.reshape(-1)[at]
        if len(item_images):
            np.testing.assert_array_equal(packed.images[image_at[: len(item_images)]], item_images)
        assert (image_at[len(item_images) :] == -1).all()
        np.testing.assert_array_equal(packed.tokens.reshape(-1)[at[len(item_images) :]], tokens)
        np.testing.assert_array_equal(
            packed.positions.reshape(-1)[at],
            [*range(len(item_images)), *range(num_images, num_images + len(tokens))],
        )
    empty = flat == -1
    assert (packed.tokens.reshape(-1)[empty] == 0).all()
    assert (packed.image_at.reshape(-1)[empty] == -1).all()


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([1, 2, 4]))
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_item_is_packed_once_in_consecutive_positions(seed, num_images, blocks):
    rng = np.random.default_rng(seed)
    items = random_items(rng, 50, image_width=5 if num_images and seed % 2 else 0)
    ids = np.where(rng.random(16) < 0.2, -1, rng.integers(0, 50, 16))
    sizes = packing.RowSizes(int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    packed = packing.pack(
        items, ids, width=16, layout=packing.Layout(num_images), rows=sizes, blocks=blocks
    )
    check(packed, items, ids, 16, num_images)
    rows = len(packed.tokens) // blocks
    assert len(packed.tokens) % blocks == 0
    assert rows >= sizes.least and (rows - sizes.least) % sizes.step == 0
    for row in np.flatnonzero(
        (packed.segments >= 0).any(axis=1)
    ):  # The rows of a block have only items of that block.
        segments = packed.segments[row][packed.segments[row] >= 0]
        assert set(segments // (16 // blocks)) == {row // rows}


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]))
@hypothesis.settings(max_examples=25, deadline=None)
def test_joined_sides_keep_their_items(seed, blocks):
    rng = np.random.default_rng(seed)
    queries, labels = random_items(rng, 30, image_width=4), random_items(rng, 20)
    ids, label_ids = rng.integers(0, 30, 8), rng.integers(0, 20, 8)
    layout, sizes = packing.Layout(2), packing.RowSizes(3, 5)
    first = packing.pack(queries, ids, width=16, layout=layout, blocks=blocks)
    second = packing.pack(labels, label_ids, width=16, layout=layout, blocks=blocks)
    both = packing.join(first, second, 8, rows=sizes, blocks=blocks)
    rows = len(both.tokens) // blocks
    assert rows >= 3 and (rows - 3) % 5 == 0
    check(
        both._replace(
            segments=np.where(both.segments < 8, both.segments, -1),
            tokens=np.where(both.segments < 8, both.tokens, 0),
            image_at=np.where(both.segments < 8, both.image_at, -1),
        ),
        queries,
        ids,
        16,
        2,
    )
    is_label = both.segments >= 8
    check(
        both._replace(
            segments=np.where(is_label, both.segments - 8, -1),
            tokens=np.where(is_label, both.tokens, 0),
            image_at=np.where(is_label, both.image_at, -1),
        ),
        labels,
        label_ids,
        16,
        2,
    )
    assert both.tokens.dtype == both.segments.dtype == np.int32
    for block, segments in enumerate(both.segments.reshape(blocks, rows, 16)):
        items = segments[segments >= 0] % 8
        assert set(items // (8 // blocks)) == {block}


def test_short_texts_fill_rows_well():
    rng = np.random.default_rng(0)
    items = random_items(rng, 20000, longest=20)
    mean = float(np.mean(np.diff(items.tokens.offsets)))
    sizes = packing.RowSizes.expected(mean, batch_size=256, width=64)
    filled, shapes = [], set()
    for _ in range(200):
        packed = packing.pack(
            items, rng.integers(0, 20000, 256), width=64, layout=packing.Layout(0), rows=sizes
        )
        filled.append(np.mean(packed.segments >= 0))
        shapes.add(len(packed.tokens))
    assert np.mean(filled) > 0.9
    assert len(shapes) <= 4


def random_relevance(rng, n, labels):
    dense = rng.random((n, labels)) < 0.15
    dense[np.arange(n), rng.integers(0, labels, n)] = True
    return dense, sparse.csr_matrix(dense, dtype=np.float32)


def test_positives_are_sampled_by_label_weight():
    rng = np.random.default_rng(3)
    dense, relevance = random_relevance(rng, 6, 9)
    weights = rng.random(9).astype(np.float32) * 5 + 0.1
    draws = 20000
    for w in (weights, None):
        ids = np.tile([0, 3, 5, -1], draws)
        drawn = sampling.sample_positives(relevance, ids, w, rng).reshape(draws, 4)
        assert (drawn[:, 3] == -1).all()
        for column, query in enumerate([0, 3, 5]):
            true = np.flatnonzero(dense[query])
            counts = np.bincount(drawn[:, column], minlength=9)
            assert counts[true].sum() == draws
            mass = np.ones(len(true)) if w is None else w[true].astype(np.float64)
            assert stats.chisquare(counts[true], draws * mass / mass.sum()).pvalue > 1e-4


def test_positives_are_sampled_by_pair_and_label_weight():
    rng = np.random.default_rng()
    dense = rng.random((5, 7)) < 0.4
    dense[:, [1, 4]] = True
    relevance = sparse.csr_matrix(dense, dtype=np.float32)
    pairs = (rng.random(relevance.nnz) * 2 + 0.5).astype(np.float32)
    owner = np.repeat(np.arange(5), np.diff(relevance.indptr))
    pairs[owner == 2] *= 1e-20  # Tiny compared to other queries, but not among its own.
    by_pair = sparse.csr_matrix((pairs, relevance.indices, relevance.indptr), (5, 7)).toarray()
    of_label = (rng.random(7) * 2 + 0.5).astype(np.float32)
    draws = 20000
    ids = np.tile([4, -1, 2, 0], draws)
    for weights in (of_label, None):
        drawn = sampling.sample_positives(relevance, ids, weights, rng, pairs).reshape(draws, 4)
        assert (drawn[:, 1] == -1).all()
        for column, query in ((0, 4), (2, 2), (3, 0)):
            true = np.flatnonzero(dense[query])
            mass = by_pair[query, true].astype(np.float64)
            mass *= 1.0 if weights is None else weights[true]
            counts = np.bincount(drawn[:, column], minlength=7)
            assert counts[true].sum() == draws
            assert stats.chisquare(counts[true], draws * mass / mass.sum()).pvalue > 1e-7


def test_pairs_of_weight_zero_are_never_sampled(dataset):
    relevance = dataset.train_relevance
    several = np.diff(relevance.indptr) > 1
    weights = np.ones(relevance.nnz, np.float32)
    weights[relevance.indptr[1:][several] - 1] = 0.0  # The last label of each query.
    last = np.where(several, relevance.indices[relevance.indptr[1:] - 1], -2)

    def drew_last(data):
        drawn = [batch for epoch in range(9) for batch in batches(data, epoch=epoch)]
        ids = np.concatenate([batch.query_ids for batch in drawn])
        labels = np.concatenate([batch.label_ids for batch in drawn])
        return (last[ids] == labels)[ids >= 0].sum()

    assert drew_last(dataset) > 0
    assert drew_last(dataclasses.replace(dataset, train_weights=weights)) == 0


def test_orders_have_every_query_once():
    rng = np.random.default_rng(5)
    np.testing.assert_array_equal(np.sort(sampling.shuffled_order(50, rng)), np.arange(50))
    clusters = rng.permutation(np.repeat(np.arange(10), 5))
    order = sampling.clustered_order(clusters, rng)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    read = clusters[order].reshape(10, 5)
    assert (read == read[:, :1]).all()
    assert (np.diff(order.reshape(10, 5), axis=1) > 0).all()
    assert not np.array_equal(read[:, 0], np.arange(10))


@pytest.fixture
def dataset():
    rng = np.random.default_rng(6)
    _, relevance = random_relevance(rng, 45, 14)
    none = np.zeros((0, 2), np.int64)
    return PreparedDataset(
        "",
        {"num_labels": 14},
        random_items(rng, 45, image_width=4),
        random_items(rng, 3),
        random_items(rng, 14),
        relevance,
        relevance[:3],
        none,
        none,
    )


def batches(dataset, **changes):
    settings = {
        "epoch": 2,
        "seed": 1,
        "batch_size": 8,
        "width": 16,
        "layout": packing.Layout(1),
        "weights": None,
        "rows": packing.RowSizes(),
        "num_threads": 2,
        "prefetch": 3,
    }
    order = np.random.default_rng(0).permutation(45)
    return input_pipeline.epoch_batches(dataset, order, **{**settings, **changes})


def assert_same(first, second):
    for a, b in zip((*first.items, *first[1:]), (*second.items, *second[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batch_depends_only_on_seed_epoch_and_index(dataset):
    first, again = list(batches(dataset)), list(batches(dataset, num_threads=1, prefetch=1))
    assert len(first) == 6
    for batch, same in zip(first, again, strict=True):
        assert_same(batch, same)
    ids = np.concatenate([batch.query_ids for batch in first])
    np.testing.assert_array_equal(np.sort(ids), [-1] * 3 + list(range(45)))
    np.testing.assert_array_equal(first[-1].label_ids[-3:], -1)
    assert first[-1].positives.queries.max() < 5
    pairs = set(zip(*first[0].positives, strict=True))
    drawn = set(enumerate(first[0].label_ids))
    assert drawn <= pairs  # The label sampled for a query is one of its labels.
    assert {label for _, label in pairs} <= {-1, *first[0].label_ids}
    other = next(batches(dataset, epoch=3))
    assert not np.array_equal(other.label_ids, first[0].label_ids)


@pytest.mark.parametrize("num_read", [1, 4])
def test_epoch_resumes_from_its_state(dataset, num_read):
    iterator = batches(dataset)
    for _ in range(num_read):
        next(iterator)
    state = iterator.get_state()
    rest = list(iterator)
    resumed = batches(dataset)
    resumed.set_state(state)
    for batch, same in zip(rest, list(resumed), strict=True):
        assert_same(batch, same)


@pytest.mark.parametrize("order", ["text_image", "image_text"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_prompts_in_both_orders(order, blocks):
    rng = np.random.default_rng(5)
    items = random_items(rng, 30, image_width=4)
    text_piece, image_piece, end = (901, 902), (903,), (904,)
    seen = {
        "text_image": (text_piece, "text", image_piece, "images", end),
        "image_text": (image_piece, "images", text_piece, "text", end),
    }[order]
    layout = packing.Layout(2, seen, (text_piece, "text", end), False, (1, 1))
    ids = np.where(rng.random(12) < 0.2, -1, rng.integers(0, 30, 12))
    hidden = rng.random(12) < 0.3
    packed = packing.pack(items, ids, width=24, layout=layout, blocks=blocks, hidden=hidden)
    flat = [x.reshape(-1) for x in packed[:4]]
    lengths = packing.item_lengths(items, width=24, layout=layout)
    for k, i in enumerate(ids):
        at = np.flatnonzero(flat[1] == k)
        if i < 0:
            assert not len(at)
            continue
        text = items.tokens.values[items.tokens.offsets[i] : items.tokens.offsets[i + 1]]
        item_images = items.images.values[items.images.offsets[i] : items.images.offsets[i + 1]][:2]
        if hidden[k]:
            item_images = item_images[:0]
        else:
            assert len(at) == lengths[i]
        expected = []
        for part in seen if len(item_images) else layout.unseen:
            if part == "text":
                expected += list(text[1:-1][: 24 - 2 - 4])
            elif part == "images":
                expected += [None] * len(item_images)
            else:
                expected += part
        item_images = iter(item_images)
        assert len(at) == len(expected) and at[-1] - at[0] == len(at) - 1
        np.testing.assert_array_equal(flat[2][at], np.arange(len(at)))
        for position, wanted in zip(at, expected, strict=True):
            if wanted is None:
                assert flat[0][position] == 0
                np.testing.assert_array_equal(packed.images[flat[3][position]], next(item_images))
            else:
                assert (flat[0][position], flat[3][position]) == (wanted, -1)


def test_image_dropout_drops_the_given_fraction(dataset):
    shown = []
    for rate in (0.0, 0.4, 1.0):
        items = [batch.items for batch in batches(dataset, image_dropout=rate)]
        shown.append(sum(len(np.unique(x.segments[x.image_at >= 0])) for x in items))
    assert shown[2] == 0
    assert 0.3 * shown[0] < shown[1] < 0.9 * shown[0]
