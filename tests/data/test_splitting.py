"""Tests of held-out splits (random, grouped, newest) and of selecting rows of raw data."""

import collections
import re

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import filters, preprocessing, splitting
from vixml_jax.data.images import image_embeddings
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical
from vixml_jax.errors import InputError

WORDS = np.array("red green blue car house Straße 漢字".split())


def draw(seed, count=50, num_labels=9, *, ids=True, weights=True, item_images=True):
    """Random queries, and their contents as plain arrays and lists."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 3))) for _ in range(count)]
    matrix = rng.random((count, num_labels)) < 0.3
    value = np.where(matrix, rng.random(matrix.shape), 0).astype(np.float32)
    pairs = np.argwhere(rng.random(matrix.shape) < 0.1)
    embeddings = rng.normal(size=(count, 2, 3)).astype(np.float16)
    present = rng.random((count, 2)) < 0.6
    held = {
        "texts": texts,
        "ids": [f"id {n}" for n in rng.permutation(count)] if ids else None,
        "relevance": matrix,
        "weights": value,
        "filter": matrix & False,
        "images": [embeddings[n][present[n]] for n in range(count)],
        "key": rng.integers(0, 12, count),
    }
    held["filter"][tuple(pairs.T)] = True
    chunks = np.split(np.arange(count), np.sort(rng.integers(0, count, 4)))
    raw = RawQueries(
        RawItems(
            count,
            lambda: ([texts[n] for n in chunk] for chunk in chunks),
            image_embeddings.RawImages(embeddings, present, "drawn") if item_images else None,
            held["ids"],
        ),
        canonical(sparse.csr_matrix(matrix.astype(np.float32))),
        value[matrix] if weights else None,
        pairs,
        held["key"],
    )
    return raw, held


def check(part, held, rows):
    """Compares a selection of queries with direct indexing of the expected contents."""
    items = part.items
    assert items.count == len(rows)
    for _ in range(2):  # Texts can be read more than once.
        texts = [text for chunk in items.read_texts() for text in chunk]
        assert texts == [held["texts"][row] for row in rows]
    names = [items.name(n) for n in range(len(rows))]
    if held["ids"] is None:
        assert names == [str(row) for row in rows] and items.ids is None
    else:
        assert names == list(items.ids) == [held["ids"][row] for row in rows]
    if items.images is not None:
        order = np.random.default_rng(0).permutation(len(rows))
        found = list(items.images.read(order))
        expected = [held["images"][rows[n]] for n in order]
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
        np.testing.assert_array_equal(
            items.images.offsets(order), np.cumsum([0, *map(len, expected)])
        )
        assert items.images.width == 3 and items.images.path == "drawn"
    np.testing.assert_array_equal(part.relevance.toarray(), held["relevance"][rows])
    found = part.relevance
    again = sparse.csr_matrix((found.data, found.indices, found.indptr), shape=found.shape)
    assert again.has_canonical_format and found.has_canonical_format
    if part.weights is not None:
        np.testing.assert_array_equal(part.weights, held["weights"][rows][held["relevance"][rows]])
    np.testing.assert_array_equal(part.filter, np.argwhere(held["filter"][rows]))
    np.testing.assert_array_equal(part.key, held["key"][rows])


@pytest.mark.parametrize("seed", range(12))
def test_repeated_selection_equals_indexing(seed):
    options = {"ids": seed % 2 == 0, "weights": seed % 3 > 0, "item_images": seed % 4 > 0}
    raw, held = draw(seed, **options)
    assert (raw.weights is None) != options["weights"]
    rng = np.random.default_rng(seed)
    rows, part = np.arange(50), raw
    check(part, held, rows)
    for _ in range(4):
        kept = np.flatnonzero(rng.random(len(rows)) < rng.choice([0.6, 0.9, 1.0]))
        rows, part = rows[kept], part.select(kept)
        check(part, held, rows)
    empty = part.select(np.arange(0))
    assert empty.items.count == empty.relevance.nnz == len(empty.filter) == 0


def test_select_without_filter_or_key():
    raw = RawQueries(*draw(0)[0].select(np.array([1])).__dict__.values())
    bare = RawQueries(raw.items, raw.relevance).select(np.arange(0))
    assert bare.filter is None and bare.key is None and bare.weights is None


def dataset(seed, **options):
    raw, held = draw(seed, **options)
    return RawDataset("drawn", {}, RawItems(9, lambda: [["label"] * 9]), raw), held


def rows_of(part):
    """The rows of queries without ids in the source."""
    return np.array([int(part.items.name(n)) for n in range(part.items.count)])


SPLIT_BY = ("random", "text", "group:brand", "time:day")


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("split_by", SPLIT_BY)
@pytest.mark.parametrize("seed", range(4))
def test_every_query_is_in_exactly_one_split(split, split_by, seed):
    raw, held = dataset(seed, ids=False)
    divided = splitting.hold_out(raw, split, 0.3, split_by=split_by, seed=seed)
    held_out, rest = getattr(divided, split), divided.train
    rows, others = rows_of(held_out), rows_of(rest)
    assert sorted([*rows, *others]) == list(range(50)) and min(len(rows), len(others)) > 0
    check(held_out, held, rows)
    check(rest, held, others)
    again = splitting.hold_out(raw, split, 0.3, split_by=split_by, seed=seed)
    np.testing.assert_array_equal(rows_of(getattr(again, split)), rows)
    assert divided.summary[-1].startswith(f"{split}: 30% of the queries held out, ")
    assert getattr(divided, {"valid": "test", "test": "valid"}[split]) is None
    if split_by == "random":
        assert len(rows) == 15
    elif split_by == "time:day":
        key = held["key"]
        assert key[rows].min() > key[others].max() and len(rows) >= 15
        # Without the oldest time that is held out, there would be too few queries.
        assert np.count_nonzero(key > key[rows].min()) < 15
    else:
        name = filters.normalise if split_by == "text" else int
        groups = [name(value) for value in held["texts" if split_by == "text" else "key"]]
        assert not {groups[row] for row in rows} & {groups[row] for row in others}
        assert len({groups[row] for row in rows}) > 1


@pytest.mark.parametrize("split_by", SPLIT_BY[:3])
def test_different_seeds_draw_different_queries(split_by):
    raw, _ = dataset(0, ids=False)
    drawn = {
        tuple(rows_of(splitting.hold_out(raw, "valid", 0.3, split_by=split_by, seed=seed).valid))
        for seed in range(8)
    }
    assert len(drawn) >= 7


def test_texts_that_are_equal_after_normalisation_stay_together():
    texts = [f"{word} {n // 4}" for n in range(80) for word in ["Straße"]]
    texts = [text.upper() if n % 2 else f" {text}" for n, text in enumerate(texts)]
    relevance = canonical(sparse.csr_matrix(np.ones((80, 1), np.float32)))
    raw = RawDataset(
        "x", {}, RawItems(1, lambda: [["l"]]), RawQueries(RawItems(80, lambda: [texts]), relevance)
    )
    rows = rows_of(splitting.hold_out(raw, "test", 0.25, split_by="text", seed=0).test)
    assert len(rows) == 20
    assert set(collections.Counter(rows // 4).values()) == {4}


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_drawn_until_they_reach_the_fraction(seed):
    rng = np.random.default_rng(seed)
    key = rng.integers(0, rng.integers(2, 40), rng.integers(30, 200))
    fraction = rng.uniform(0.1, 0.6) if seed % 4 else 0.001
    drawn = splitting.random_groups(key, fraction, seed=seed)
    sizes = collections.Counter(key[drawn].tolist())
    assert all(np.count_nonzero(key == group) == size for group, size in sizes.items())
    wanted = max(1, round(fraction * len(key)))
    assert drawn.sum() >= wanted
    # Without the group that was drawn last there are too few rows.
    assert any(drawn.sum() - size < wanted for size in sizes.values())


def test_all_rows_are_drawn_equally_often():
    masks = [splitting.random_groups(np.arange(40), 0.25, seed=seed) for seed in range(400)]
    assert {mask.sum() for mask in masks} == {10}
    times_drawn = np.sum(masks, axis=0)  # Expected: 100 each, with a standard deviation of 9.
    assert 60 < times_drawn.min() and times_drawn.max() < 140
    groups = np.repeat(np.arange(8), [1, 1, 2, 2, 4, 4, 8, 8])
    masks = [splitting.random_groups(groups, 0.3, seed=seed) for seed in range(400)]
    assert np.sum(masks, axis=0).min() > 60  # Both small and large groups are drawn.


@pytest.mark.parametrize("seed", range(10))
def test_newest_holds_out_the_newest_rows(seed):
    rng = np.random.default_rng(seed)
    time = rng.integers(0, rng.integers(2, 60), 50).astype(rng.choice(["i8", "f8"]))
    ordered = sorted(time.tolist(), reverse=True)
    for fraction in (0.001, rng.uniform(0.01, 0.5)):
        oldest = ordered[max(1, round(fraction * 50)) - 1]
        np.testing.assert_array_equal(splitting.newest(time, fraction), [t >= oldest for t in time])


@pytest.mark.parametrize(
    "fraction,split_by,change,message",
    [
        (0.3, "group:brand", {"key": None}, "--split_by=group:brand: the source has no columns"),
        (0.3, "time:day", {"key": None}, "--split_by=time:day: the source has no columns"),
        (0.3, "group:brand", {"key": np.zeros(50)}, "--valid=0.3: 50 of 50 training queries"),
        (0.3, "time:day", {"key": np.zeros(50)}, "--valid=0.3: 50 of 50 training queries"),
        (0.999, "random", {}, "--valid=0.999: 50 of 50 training queries would be held out"),
        (0.3, "brand", {}, "--split_by=brand: expected random, text, group:COLUMN or time:COLUMN"),
        (0.3, "group:", {}, "--split_by=group:: expected random"),
        (0.3, "random:x", {}, "--split_by=random:x: expected random"),
        (0.3, "", {}, "--split_by=: expected random"),
    ],
)
def test_impossible_splits_are_refused(fraction, split_by, change, message):
    raw, _ = dataset(0)
    queries = RawQueries(**{**raw.train.__dict__, **change})
    raw = RawDataset("x", {}, raw.labels, queries)
    with pytest.raises(InputError, match=re.escape(message)):
        splitting.hold_out(raw, "valid", fraction, split_by=split_by, seed=0)


def test_summary_shows_small_fractions_exactly(tmp_path):
    raw, _ = dataset(0, count=2000)
    divided = splitting.hold_out(raw, "valid", 0.0025, split_by="time:day", seed=0)
    assert divided.summary == ("valid: 0.25% of the queries held out, the newest by 'day'",)


def test_test_is_held_out_before_valid():
    raw, _ = dataset(1, ids=False, count=100)
    labelled = set(np.flatnonzero(raw.train.relevance.getnnz(axis=1)).tolist())
    assert len(labelled) < 100
    settings = preprocessing.Settings(test=0.2, valid=0.25, filters="none")
    raw, notes = preprocessing.split_and_filter(raw, settings)
    parts = [rows_of(raw.splits[split]) for split in ("test", "valid", "train")]
    num_test = round(0.2 * len(labelled))
    assert [len(rows) for rows in parts[:2]] == [num_test, round(0.25 * (len(labelled) - num_test))]
    # A query without a label is not held out, where it would count as an error.
    assert sorted(np.concatenate(parts)) == sorted(labelled)
    assert (notes["rows_read"], notes["train_without_labels_dropped"]) == (100, 100 - len(labelled))


def write_source(directory, rng):
    """Writes a source in the XML repository's layout, with repeated texts, images and filters."""
    directory.mkdir()
    counts = {"trn": 60, "tst": 8, "lbl": 7}
    held = {}
    for prefix, count in counts.items():
        texts = [f"{rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in range(count)]
        texts = [text.upper() if rng.random() < 0.3 else text for text in texts]
        (directory / f"{prefix}.raw.txt").write_bytes("".join(f"{t}\n" for t in texts).encode())
        embeddings = rng.normal(size=(count, 2, 3)).astype(np.float16)
        present = rng.random((count, 2)) < 0.6
        np.save(directory / f"{prefix}_image_embeddings.npy", embeddings)
        np.save(directory / f"{prefix}_has_image.npy", present)
        held[prefix] = {
            "texts": texts,
            "images": [embeddings[n][present[n]] for n in range(count)],
        }
        if prefix == "lbl":
            continue
        relevance = rng.random((count, 7)) < 0.3
        rows = [" ".join(f"{label}:1" for label in np.flatnonzero(row)) for row in relevance]
        (directory / f"{prefix}_X_Y.txt").write_text(
            f"{count} 7\n" + "".join(f"{row}\n" for row in rows)
        )
        pairs = rng.random((count, 7)) < 0.1
        split = {"trn": "train", "tst": "test"}[prefix]
        (directory / f"filter_labels_{split}.txt").write_text(
            "".join(f"{query} {label}\n" for query, label in np.argwhere(pairs))
        )
        held[prefix] |= {"relevance": relevance, "filter": pairs}
    return held


@pytest.mark.parametrize("seed", range(3))
def test_prepare_writes_the_held_out_split(tmp_path, seed):
    held = write_source(tmp_path / "raw", np.random.default_rng(seed))
    raw = preprocessing.read_source(str(tmp_path / "raw"))
    settings = preprocessing.Settings(valid=0.2, split_by="text", vocab_size=64, seed=seed)
    prepared = preprocessing.prepare(raw, str(tmp_path / "out"), settings)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(prepared.tokenizer)
    rows = {}
    for split, prefix in (("train", "trn"), ("valid", "trn"), ("test", "tst")):
        items, relevance, pairs = prepared.split(split)
        rows[split] = [int(name) for name in items.ids]
        texts = [held[prefix]["texts"][row] for row in rows[split]]
        assert list(items.texts) == texts
        begin = items.tokens.offsets
        for n, text in enumerate(texts):
            tokens = items.tokens.values[begin[n] : begin[n + 1]].tolist()
            assert tokens == tokenizer.encode(text).ids
        for n, row in enumerate(rows[split]):
            a, b = items.images.offsets[n : n + 2]
            np.testing.assert_array_equal(items.images.values[a:b], held[prefix]["images"][row])
        np.testing.assert_array_equal(relevance.toarray(), held[prefix]["relevance"][rows[split]])
        np.testing.assert_array_equal(pairs, np.argwhere(held[prefix]["filter"][rows[split]]))
    normal = [filters.normalise(text) for text in held["trn"]["texts"]]
    train, valid = ({normal[row] for row in rows[split]} for split in ("train", "valid"))
    assert train and valid and not train & valid
    assert len(rows["valid"]) >= 12
    # Only training queries without labels are missing.
    missing = set(range(60)) - {*rows["train"], *rows["valid"]}
    unlabelled = set(np.flatnonzero(~held["trn"]["relevance"].any(axis=1)).tolist())
    assert missing == unlabelled - set(rows["valid"])
    assert rows["test"] == list(range(8))
