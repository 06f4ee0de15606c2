"""Filter pairs against sets of Python: equal ids, equal texts, reciprocal pairs, two doubts."""

import collections
import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import filters, preprocessing
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical
from vixml_jax.errors import InputError

# Texts of one thing, for each of some things; of the last, texts that are empty.
SPELT = [
    ["red car", "Red  Car", "RED\tCAR ", "\u3000red\u00a0car", "ｒｅｄ　ＣＡＲ"],
    ["Straße", "STRASSE", " straße", "strasse\n"],
    ["café", "cafe\u0301", "CAFÉ", "ＣＡＦＥ\u0301"],
    ["ﬁne ①", "fine 1", "FINE １"],
    ["redcar", "REDCAR"],
    ["cafe"],
    ["漢字", "漢字 "],
    ["", " ", "\t\u3000\n"],
]
EMPTY = len(SPELT) - 1


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
    """A random data set, and the same as sets: what each thing is, its id, its labels."""
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(3, 12))
    ids_follow, texts_answer = rng.random(2) < 0.5
    things = {"labels": rng.integers(0, len(SPELT), num_labels)}
    for split in ("train", "valid", "test"):
        if split != "valid" or rng.random() < 0.5:
            things[split] = rng.integers(0, len(SPELT), rng.integers(4, 30))
    held = {}
    for part, found in things.items():
        texts = [str(rng.choice(SPELT[thing])) for thing in found]
        ids = None
        if rng.random() < 0.7:
            numbers = rng.integers(0, 9, len(found))
            ids = [f"thing {a}" if ids_follow else f"{b}" if b else "" for a, b in
                   zip(found, numbers, strict=True)]  # fmt: skip
        held[part] = {"things": found, "texts": texts, "ids": ids}
    queries = {}
    for split in things.keys() - {"labels"}:
        part = held[split]
        shape = (len(part["things"]), num_labels)
        same = part["things"][:, None] == held["labels"]["things"]
        chance = np.where(same, 0.5 if texts_answer else 0.01, 0.3)
        part["pairs"] = set(map(tuple, np.argwhere(rng.random(shape) < chance).tolist()))
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
    """Filter pairs, report and relevance of each split, by the definition, one pair at a time."""
    labels = held["labels"]
    splits = [split for split in ("train", "valid", "test") if split in held]
    all_same = {}
    for split in splits:
        part = held[split]
        every = list(itertools.product(range(len(part["texts"])), range(len(labels["texts"]))))
        all_same[split] = {
            "id": {
                (q, label) for q, label in every
                if part["ids"] and labels["ids"] and part["ids"][q]
                and part["ids"][q] == labels["ids"][label]
            },
            "text": {
                (q, label) for q, label in every
                if part["things"][q] == labels["things"][label] != EMPTY
            },
        }  # fmt: skip
    by_id = sum(len(found["id"]) for found in all_same.values())
    alike = sum(len(found["id"] & found["text"]) for found in all_same.values())
    are_numbers = 2 * alike < by_id
    in_train = all_same["train"]["text"]
    are_answers = 20 * len(in_train & held["train"]["pairs"]) > len(in_train)
    own = {
        split: (set() if are_numbers else found["id"]) | (set() if are_answers else found["text"])
        for split, found in all_same.items()
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
            for b, own_b in own[split]:  # Query B is label own_b, which query A of training has.
                for a, label_of_a in own["train"]:
                    if (a, own_b) in held["train"]["pairs"]:
                        reciprocal.add((b, label_of_a))
        made[split] = own[split] | reciprocal
        left[split] = pairs if split == "train" else pairs - made[split]
        ids = set() if are_numbers else all_same[split]["id"]
        report[split] = {
            "pairs": len(made[split]),
            "id": len(ids),
            "text": len(own[split] - ids),
            "reciprocal": len(reciprocal - own[split]),
            "answers": len(all_same[split]["text"]) if are_answers else 0,
            "numbers": len(all_same[split]["id"]) if are_numbers else 0,
            "relevant": len(made[split] & pairs),
        }
    return made, report, left


NUM_SEEDS = 150


@pytest.mark.parametrize("seeds", np.array_split(np.arange(NUM_SEEDS), 5), ids=lambda part: part[0])
def test_filters_are_those_of_the_definition(seeds):
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
            # The source is left as it is.
            assert raw.splits[split].relevance.nnz == len(held[split]["pairs"])


def test_every_case_is_among_those_drawn():
    seen = collections.Counter()
    for seed in range(NUM_SEEDS):
        for counts in expected_of(draw(seed)[1])[1].values():
            seen.update(reason for reason, count in counts.items() if count)
    assert seen.keys() == {
        *("given", "pairs", "id", "text", "reciprocal", "answers", "numbers", "relevant")
    }
    assert min(seen.values()) >= 20, seen


def test_no_filters_are_made_where_none_are_wanted():
    raw, held = draw(3)
    found, report = filters.given_filters(raw)
    for split, part in found.splits.items():
        given = held[split]["filter"] or set()
        assert {tuple(pair) for pair in part.filter.tolist()} == given
        assert part.filter.shape == (len(given), 2)
        assert report[split] == {"given": len(given)}
        assert part.relevance is raw.splits[split].relevance
    assert filters.describe(report) == [
        f"{split}: {count['given']:,} filter pairs, as given"
        for split, count in report.items()
        if count["given"]
    ]


def test_all_given_is_taken_as_it_is():
    raw = RawDataset(
        "given", {}, items(["a", "b"]),
        RawQueries(items(["a"]), relevance_of({(0, 1)}, (1, 2)), filter=np.array([[0, 1]])),
    )  # fmt: skip
    found, report = filters.make_filters(raw)
    assert found is raw and report == {"train": {"given": 1}}


def test_reciprocal_pairs_as_told():
    # "If product A was trained to find B, then B finding A is remembered, not predicted."
    labels = items(["A", "B", "C"])
    train = RawQueries(items(["a", "c"]), relevance_of({(0, 1), (1, 0)}, (2, 3)))
    test = RawQueries(items(["b", "d"]), relevance_of({(0, 0), (0, 2)}, (2, 3)))
    found, report = filters.make_filters(RawDataset("x", {}, labels, train, test))
    assert found.train.filter.tolist() == [[0, 0], [1, 2]]
    assert found.test.filter.tolist() == [[0, 0], [0, 1]]
    np.testing.assert_array_equal(found.test.relevance.toarray(), [[0, 0, 1], [0, 0, 0]])
    assert filters.describe(report) == [
        "train: 2 filter pairs made (2 of the same text); 0 of them were relevant",
        "test: 2 filter pairs made (1 of the same text, 1 reciprocal); 1 of them were relevant "
        "and no longer count",
    ]


@pytest.mark.parametrize("relevant,are_answers", [(1, False), (2, True)])
def test_the_edge_of_five_percent(relevant, are_answers):
    names = [str(n) for n in range(20)]
    pairs = {(n, n) for n in range(relevant)} | {(0, 5)}
    train = RawQueries(items(names), relevance_of(pairs, (20, 20)))
    test = RawQueries(items(["7"]), relevance_of({(0, 7)}, (1, 20)))
    found, report = filters.make_filters(RawDataset("x", {}, items(names), train, test))
    assert len(found.train.filter) == (0 if are_answers else 20)
    assert report["test"]["answers"] == are_answers
    assert found.test.relevance.nnz == are_answers
    said = "train: 20 labels have the text of their query; in training such labels are often"
    assert any(line.startswith(said) for line in filters.describe(report)) == are_answers


@pytest.mark.parametrize("alike,are_numbers", [(4, True), (5, False)])
def test_the_edge_of_half(alike, are_numbers):
    names = [str(n) for n in range(10)]
    texts = [f"t{n}" if n < alike else f"other {n}" for n in range(10)]
    train = RawQueries(items(texts, names), relevance_of({(0, 1)}, (10, 10)))
    labels = items([f"t{n}" for n in range(10)], names)
    found, report = filters.make_filters(RawDataset("x", {}, labels, train))
    assert len(found.train.filter) == (alike if are_numbers else 10)
    said = "train: 10 labels have the id of their query but mostly another text"
    assert any(line.startswith(said) for line in filters.describe(report)) == are_numbers


def test_numbers_of_rows_are_no_ids():
    # Parts of queries without ids must not take the numbers of their rows for ids.
    labels = items([f"label {n}" for n in range(9)], [str(n) for n in range(9)])
    train = RawQueries(
        items([f"label {n}" for n in range(9)]), relevance_of({(n, 0) for n in range(9)}, (9, 9))
    )
    raw, notes = preprocessing.settle(
        RawDataset("x", {}, labels, train), preprocessing.Settings(test=0.3, valid=0.3)
    )
    for split in raw.splits:
        assert notes["filters"][split]["id"] == notes["filters"][split]["numbers"] == 0


def test_texts_that_are_one_and_texts_that_are_not():
    for one, other in itertools.combinations(range(len(SPELT)), 2):
        assert not {filters.normalise(text) for text in SPELT[one]} & {
            filters.normalise(text) for text in SPELT[other]
        }
    for spelt in SPELT:
        assert len({filters.normalise(text) for text in spelt}) == 1
        assert len(set(filters.text_keys(items(spelt)).tolist())) == 1
    found = filters.text_keys(items([spelt[0] for spelt in SPELT]))
    assert found.dtype == np.uint64 and len(set(found.tolist())) == len(SPELT)
    assert (found == 0).tolist() == [False] * EMPTY + [True]
    assert filters.id_keys(items(["a"])) is None
    assert len(filters.keys([])) == 0


def test_random_keys_are_matched():
    rng = np.random.default_rng(0)
    for shape in ((0, 5), (5, 0), (40, 60), (300, 200)):
        queries, labels = (rng.integers(0, 50, size).astype(np.uint64) for size in shape)
        found = filters.same_keys(queries, labels, "text")
        expected = (queries[:, None] == labels) & (queries[:, None] != 0)
        np.testing.assert_array_equal(found.toarray(), expected)
        again = sparse.csr_matrix((found.data, found.indices, found.indptr), shape=shape)
        assert again.has_canonical_format  # Found out, not as claimed.


def test_what_would_take_all_memory_is_refused():
    many = np.ones(30_000, np.uint64)
    with pytest.raises(InputError) as caught:
        filters.same_keys(many, many, "text")
    assert str(caught.value).startswith(
        "900,000,000 pairs of a query and a label have the same text, up to 30,000 of one query; "
    )
    assert "--filters=none" in str(caught.value)


def test_texts_are_not_held():
    count = 100_000
    items_ = RawItems(
        count, lambda: ([str(n + k) for k in range(1000)] for n in range(0, count, 1000))
    )
    tracemalloc.start()
    found = filters.text_keys(items_)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == count
    assert peak < 32 * count  # A text of Python's alone takes 55 bytes.


def test_a_large_set():
    # A tenth of the largest published: 200 thousand queries, 130 thousand labels, 5 million pairs.
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
    # A query of the test has its label, and the training queries that have this label.
    asked = train.relevance.tocsc()[:, [int(next(iter(test.items.read_texts()))[0][1:])]]
    known = products[:num_train][asked.nonzero()[0]]
    expected = {
        *known[known < num_labels].tolist(),
        int(next(iter(test.items.read_texts()))[0][1:]),
    }
    assert set(found.test.filter[found.test.filter[:, 0] == 0, 1].tolist()) == expected
    assert peak < 200 << 20
