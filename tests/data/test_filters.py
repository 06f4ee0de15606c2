"""Tests of filter pairs against Python sets: ids, texts, reciprocal pairs and the exceptions."""

import collections
import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import filters, preprocessing
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical
from vixml_jax.errors import InputError

# For each of several items, texts that are equal after normalisation; the last ones are empty.
SPELLINGS = [
    ["red car", "Red  Car", "RED\tCAR ", "\u3000red\u00a0car", "ｒｅｄ　ＣＡＲ"],
    ["Straße", "STRASSE", " straße", "strasse\n"],
    ["café", "cafe\u0301", "CAFÉ", "ＣＡＦＥ\u0301"],
    ["ﬁne ①", "fine 1", "FINE １"],
    ["redcar", "REDCAR"],
    ["cafe"],
    ["漢字", "漢字 "],
    ["", " ", "\t\u3000\n"],
]
EMPTY = len(SPELLINGS) - 1


def items(texts, ids=None, chunk=3):
    def read():
        for start in range(0, len(texts), chunk):
            yield list(texts[start : start + chunk])

    return RawItems(len(texts), read, None, ids)


def relevance_of(pairs, shape):
    matrix = np.zeros(shape, np.float32)
    for query, label in pairs:
        matrix[query, label] = 1.0
    return canonical(sparse.csr_matrix(matrix))


def draw(seed):
    """A random data set, and its contents: the item of each row, its text, id and labels."""
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(3, 12))
    ids_identify_items, equal_texts_are_relevant = rng.random(2) < 0.5
    items_of = {"labels": rng.integers(0, len(SPELLINGS), num_labels)}
    for split in ("train", "valid", "test"):
        if split != "valid" or rng.random() < 0.5:
            items_of[split] = rng.integers(0, len(SPELLINGS), rng.integers(4, 30))
    held = {}
    for part, part_items in items_of.items():
        texts = [str(rng.choice(SPELLINGS[item])) for item in part_items]
        ids = None
        if rng.random() < 0.7:
            numbers = rng.integers(0, 9, len(part_items))
            ids = [
                f"item {item}" if ids_identify_items else f"{number}" if number else ""
                for item, number in zip(part_items, numbers, strict=True)
            ]
        held[part] = {"items": part_items, "texts": texts, "ids": ids}
    queries = {}
    for split in items_of.keys() - {"labels"}:
        part = held[split]
        shape = (len(part["items"]), num_labels)
        same = part["items"][:, None] == held["labels"]["items"]
        probability = np.where(same, 0.5 if equal_texts_are_relevant else 0.01, 0.3)
        part["pairs"] = set(map(tuple, np.argwhere(rng.random(shape) < probability).tolist()))
        relevance = relevance_of(part["pairs"], shape)
        weights = None
        if rng.random() < 0.5:
            weights = rng.random(relevance.nnz).astype(np.float32)
            places = zip(*(axis.tolist() for axis in relevance.nonzero()), strict=True)
            part["weights"] = dict(zip(places, weights, strict=True))
        part["filter"] = None
        given = None
        if rng.random() < 0.2:
            given = np.argwhere(rng.random(shape) < 0.2)
            part["filter"] = set(map(tuple, given.tolist()))
        queries[split] = RawQueries(
            items(part["texts"], part["ids"]), relevance, weights=weights, filter=given
        )
    labels = items(held["labels"]["texts"], held["labels"]["ids"])
    return RawDataset("random", {}, labels, **queries), held


def expected_of(held):
    """Filter pairs, report and relevance of each split, by definition, one pair at a time."""
    labels = held["labels"]
    splits = [split for split in ("train", "valid", "test") if split in held]
    equal = {}
    for split in splits:
        part = held[split]
        pairs = list(itertools.product(range(len(part["texts"])), range(len(labels["texts"]))))
        equal[split] = {
            "id": {
                (query, label)
                for query, label in pairs
                if part["ids"]
                and labels["ids"]
                and part["ids"][query]
                and part["ids"][query] == labels["ids"][label]
            },
            "text": {
                (query, label)
                for query, label in pairs
                if part["items"][query] == labels["items"][label] != EMPTY
            },
        }
    equal_ids = sum(len(by_reason["id"]) for by_reason in equal.values())
    equal_both = sum(len(by_reason["id"] & by_reason["text"]) for by_reason in equal.values())
    ids_are_separate = 2 * equal_both < equal_ids
    in_train = equal["train"]["text"]
    texts_are_relevant = 20 * len(in_train & held["train"]["pairs"]) > len(in_train)
    same_item = {
        split: (set() if ids_are_separate else by_reason["id"])
        | (set() if texts_are_relevant else by_reason["text"])
        for split, by_reason in equal.items()
    }
    made, report, left = {}, {}, {}
    for split in splits:
        pairs = held[split]["pairs"]
        if held[split]["filter"] is not None:
            made[split], left[split] = held[split]["filter"], pairs
            report[split] = {"given": len(made[split])}
            continue
        reciprocal = set()
        if split != "train":
            # Query b is the label label_b, which is relevant to the training query a.
            for b, label_b in same_item[split]:
                for a, label_a in same_item["train"]:
                    if (a, label_b) in held["train"]["pairs"]:
                        reciprocal.add((b, label_a))
        made[split] = same_item[split] | reciprocal
        left[split] = pairs if split == "train" else pairs - made[split]
        ids = set() if ids_are_separate else equal[split]["id"]
        report[split] = {
            "pairs": len(made[split]),
            "id": len(ids),
            "text": len(same_item[split] - ids),
            "reciprocal": len(reciprocal - same_item[split]),
            "answers": len(equal[split]["text"]) if texts_are_relevant else 0,
            "numbers": len(equal[split]["id"]) if ids_are_separate else 0,
            "relevant": len(made[split] & pairs),
        }
    return made, report, left


NUM_SEEDS = 150


@pytest.mark.parametrize("seeds", np.array_split(np.arange(NUM_SEEDS), 5), ids=lambda part: part[0])
def test_filters_match_the_definition(seeds):
    for seed in seeds:
        raw, held = draw(seed)
        found, report = filters.make_filters(raw)
        made, expected, left = expected_of(held)
        assert report == expected, seed
        for split, part in found.splits.items():
            assert part.filter.dtype == np.int64 and part.filter.shape == (len(made[split]), 2)
            assert part.filter.tolist() == [list(pair) for pair in sorted(made[split])], seed
            rows, columns = part.relevance.nonzero()
            places = list(zip(rows.tolist(), columns.tolist(), strict=True))
            assert set(places) == left[split] and len(places) == part.relevance.nnz
            assert (part.relevance.data == 1).all() and part.relevance.dtype == np.float32
            assert part.items is raw.splits[split].items
            if raw.splits[split].weights is None:
                assert part.weights is None
            else:
                weights = held[split]["weights"]
                np.testing.assert_array_equal(part.weights, [weights[pair] for pair in places])
            # The input does not change.
            assert raw.splits[split].relevance.nnz == len(held[split]["pairs"])


def test_random_data_cover_every_case():
    seen = collections.Counter()
    for seed in range(NUM_SEEDS):
        for counts in expected_of(draw(seed)[1])[1].values():
            seen.update(reason for reason, count in counts.items() if count)
    assert seen.keys() == {
        *("given", "pairs", "id", "text", "reciprocal", "answers", "numbers", "relevant")
    }
    assert min(seen.values()) >= 20, seen


def test_given_filters_generates_no_pairs():
    raw, held = draw(3)
    found, report = filters.given_filters(raw)
    for split, part in found.splits.items():
        given = held[split]["filter"] or set()
        assert {tuple(pair) for pair in part.filter.tolist()} == given
        assert part.filter.shape == (len(given), 2)
        assert report[split] == {"given": len(given)}
        assert part.relevance is raw.splits[split].relevance
    assert filters.describe(report) == [
        f"{split}: {count['given']:,} filter pairs from the source"
        for split, count in report.items()
        if count["given"]
    ]


def test_data_set_with_all_filters_is_unchanged():
    raw = RawDataset(
        "given", {}, items(["a", "b"]),
        RawQueries(items(["a"]), relevance_of({(0, 1)}, (1, 2)), filter=np.array([[0, 1]])),
    )  # fmt: skip
    found, report = filters.make_filters(raw)
    assert found is raw and report == {"train": {"given": 1}}


def test_reciprocal_pairs_by_hand():
    # If B is a label of the training query A, then A as a label of B is known from training.
    labels = items(["A", "B", "C"])
    train = RawQueries(items(["a", "c"]), relevance_of({(0, 1), (1, 0)}, (2, 3)))
    test = RawQueries(items(["b", "d"]), relevance_of({(0, 0), (0, 2)}, (2, 3)))
    found, report = filters.make_filters(RawDataset("x", {}, labels, train, test))
    assert found.train.filter.tolist() == [[0, 0], [1, 2]]
    assert found.test.filter.tolist() == [[0, 0], [0, 1]]
    np.testing.assert_array_equal(found.test.relevance.toarray(), [[0, 0, 1], [0, 0, 0]])
    assert filters.describe(report) == [
        "train: 2 filter pairs generated (2 same text); 0 of them relevant",
        "test: 2 filter pairs generated (1 same text, 1 reciprocal); 1 of them relevant, no longer "
        "counted",
    ]


@pytest.mark.parametrize("num_relevant,texts_are_relevant", [(1, False), (2, True)])
def test_equal_texts_are_kept_if_more_than_five_percent_are_relevant(
    num_relevant, texts_are_relevant
):
    names = [str(n) for n in range(20)]
    pairs = {(n, n) for n in range(num_relevant)} | {(0, 5)}
    train = RawQueries(items(names), relevance_of(pairs, (20, 20)))
    test = RawQueries(items(["7"]), relevance_of({(0, 7)}, (1, 20)))
    found, report = filters.make_filters(RawDataset("x", {}, items(names), train, test))
    assert len(found.train.filter) == (0 if texts_are_relevant else 20)
    assert report["test"]["answers"] == texts_are_relevant
    assert found.test.relevance.nnz == texts_are_relevant
    start = (
        "train: 20 labels have the text of their query; they can be predicted, because such labels "
        "are often"
    )
    assert any(line.startswith(start) for line in filters.describe(report)) == texts_are_relevant


@pytest.mark.parametrize("equal_texts,ids_are_separate", [(4, True), (5, False)])
def test_equal_ids_are_kept_if_less_than_half_have_equal_texts(equal_texts, ids_are_separate):
    names = [str(n) for n in range(10)]
    texts = [f"t{n}" if n < equal_texts else f"other {n}" for n in range(10)]
    train = RawQueries(items(texts, names), relevance_of({(0, 1)}, (10, 10)))
    labels = items([f"t{n}" for n in range(10)], names)
    found, report = filters.make_filters(RawDataset("x", {}, labels, train))
    assert len(found.train.filter) == (equal_texts if ids_are_separate else 10)
    start = "train: 10 labels have the id of their query but mostly another text"
    assert any(line.startswith(start) for line in filters.describe(report)) == ids_are_separate


def test_row_numbers_are_not_ids():
    # Selected queries without ids must not use their row numbers as ids.
    labels = items([f"label {n}" for n in range(9)], [str(n) for n in range(9)])
    train = RawQueries(
        items([f"label {n}" for n in range(9)]), relevance_of({(n, 0) for n in range(9)}, (9, 9))
    )
    raw, notes = preprocessing.split_and_filter(
        RawDataset("x", {}, labels, train), preprocessing.Settings(test=0.3, valid=0.3)
    )
    for split in raw.splits:
        assert notes["filters"][split]["id"] == notes["filters"][split]["numbers"] == 0


def test_normalisation_and_keys():
    for first, second in itertools.combinations(SPELLINGS, 2):
        assert not {filters.normalise(text) for text in first} & {
            filters.normalise(text) for text in second
        }
    for texts in SPELLINGS:
        assert len({filters.normalise(text) for text in texts}) == 1
        assert len(set(filters.text_keys(items(texts)).tolist())) == 1
    keys = filters.text_keys(items([texts[0] for texts in SPELLINGS]))
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == len(SPELLINGS)
    assert (keys == 0).tolist() == [False] * EMPTY + [True]
    assert filters.id_keys(items(["a"])) is None
    assert len(filters.keys([])) == 0


def test_same_keys_match_pairwise_comparison():
    rng = np.random.default_rng(0)
    for shape in ((0, 5), (5, 0), (40, 60), (300, 200)):
        queries, labels = (rng.integers(0, 50, size).astype(np.uint64) for size in shape)
        found = filters.same_keys(queries, labels, "text")
        expected = (queries[:, None] == labels) & (queries[:, None] != 0)
        np.testing.assert_array_equal(found.toarray(), expected)
        again = sparse.csr_matrix((found.data, found.indices, found.indptr), shape=shape)
        assert again.has_canonical_format  # Determined by SciPy, not set by the function.


def test_too_many_pairs_are_refused():
    many = np.ones(30_000, np.uint64)
    with pytest.raises(InputError) as caught:
        filters.same_keys(many, many, "text")
    assert str(caught.value).startswith(
        "900,000,000 pairs of a query and a label have the same text, up to 30,000 for one query; "
    )
    assert "--filters=none" in str(caught.value)


def test_text_keys_do_not_keep_texts_in_memory():
    count = 100_000
    items_ = RawItems(
        count, lambda: ([str(n + k) for k in range(1000)] for n in range(0, count, 1000))
    )
    tracemalloc.start()
    found = filters.text_keys(items_)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == count
    assert peak < 32 * count  # A Python string takes at least 55 bytes.


def test_a_large_data_set():
    # A tenth of the largest public one: 200 thousand queries, 130 thousand labels, 5 million pairs.
    rng = np.random.default_rng(0)
    num_train, num_test, num_labels = 200_000, 97_000, 130_000

    def queries(products, per_query):
        indices = np.sort(rng.integers(0, num_labels // per_query, (len(products), per_query)))
        indices = (indices * per_query + np.arange(per_query)).astype(np.int32)
        indptr = np.arange(0, indices.size + 1, per_query)
        ones = np.ones(indices.size, np.float32)
        shape = (len(products), num_labels)
        matrix = canonical(sparse.csr_matrix((ones, indices.ravel(), indptr), shape=shape))
        return RawQueries(items([f"p{n}" for n in products], chunk=1 << 14), matrix)

    products = rng.permutation(225_000)
    train, test = (
        queries(products[:num_train], 25),
        queries(rng.permutation(num_labels)[:num_test], 22),
    )
    labels = items([f"P{n}" for n in range(num_labels)], chunk=1 << 14)
    tracemalloc.start()
    found, report = filters.make_filters(RawDataset("large", {}, labels, train, test))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["test"]["text"] == num_test
    assert report["train"]["pairs"] == np.count_nonzero(products[:num_train] < num_labels)
    # The first test query has its own label, and the training queries that have this label.
    label = int(next(iter(test.items.read_texts()))[0][1:])
    train_rows = train.relevance.tocsc()[:, [label]].nonzero()[0]
    reciprocal = products[:num_train][train_rows]
    expected = {*reciprocal[reciprocal < num_labels].tolist(), label}
    assert set(found.test.filter[found.test.filter[:, 0] == 0, 1].tolist()) == expected
    assert peak < 200 << 20
