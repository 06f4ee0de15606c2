"""The data card: every number counted another way, one line a text, pages that are the same."""

import collections
import dataclasses
import gc
import json
import re
import unicodedata

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import preprocessing
from vixml_jax.data.card import card, plots, stats
from vixml_jax.data.images.image_files import RawImages
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

WORDS = "red Green blue CAR house tree Straße naïve 漢字 ｗｉｄｅ x1".split()


def make_raw(seed, *, valid=True, pictures=True, name="random", warnings=()):
    """A random source; few different texts, many of them empty or equal but for their case."""
    rng = np.random.default_rng(seed)

    def texts(count):
        made = [" ".join(rng.choice(WORDS, rng.integers(0, 4))) for _ in range(count)]
        made += [" ".join(rng.choice(WORDS, 30)) for _ in range(3)]
        styles = [str, str.upper, lambda text: f" {text}\t", lambda text: text.replace(" ", "  ")]
        return [styles[rng.integers(len(styles))](text) for text in made]

    def items(count, with_pictures):
        made = texts(count)
        count = len(made)
        images = None
        if with_pictures:
            present = rng.random((count, 3)) < 0.4
            images = RawImages(np.ones((count, 3, 2), np.float16), present, "made")
        return RawItems(count, lambda: [made[:7], made[7:]], images)

    def queries(count, with_pictures, train=False):
        found = items(count, with_pictures)
        dense = rng.random((found.count, 40)) < np.maximum(np.linspace(0, 0.3, 40) ** 1.5, 0.03)
        if train:
            dense[0, 10:20] = True  # More labels than an example shows.
            dense[:, :6] = False  # Labels that are never seen.
        else:
            dense[::9, 6:] = False  # Queries that have no others.
            dense[9, 2] = True
        dense[4] = False
        return RawQueries(found, canonical(sparse.csr_matrix(dense.astype(np.float32))))

    return RawDataset(
        name=name,
        fingerprint={"path": "/where/it/was"},
        labels=items(37, False),
        train=queries(150, pictures, train=True),
        test=queries(60, pictures),
        valid=queries(30, False) if valid else None,
        warnings=warnings,
    )


def prepare(raw, out, **options):
    settings = {"max_tokens": 8, "vocab_size": 64, "filters": "none", **options}
    return preprocessing.prepare(raw, str(out), preprocessing.Settings(**settings))


def normal(text):
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def expected_part(texts, tokenizer, pictures, max_tokens):
    """The facts of a part, by Python's own means."""
    whole = [len(tokenizer.encode(text).ids) for text in texts]
    again = collections.Counter(map(normal, texts))
    groups = [count for text, count in again.items() if text and count > 1]
    return {
        "tokens": collections.Counter(whole),
        "cut": sum(length > max_tokens for length in whole),
        "lost": sum(max(length - max_tokens, 0) for length in whole),
        "empty": again[""],
        "repeated": sum(groups),
        "distinct": len(groups),
        "pictures": None if pictures is None else collections.Counter(pictures),
    }


def expected_split(rows, frequency, texts, known):
    """The facts of a split; rows are sets of labels."""
    groups = collections.Counter()
    for row in rows:
        for label in row:
            count = frequency[label]
            place = "head" if count > 100 else "torso" if count > 5 else "tail"
            groups[place if count else "unseen"] += 1
    seen = [sum(frequency[label] > 0 for label in row) for row in rows]
    return {
        "labels": collections.Counter(map(len, rows)),
        "group_pairs": {name: groups[name] for name, _, _ in stats.GROUPS},
        "hopeless": sum(bool(row) and not found for row, found in zip(rows, seen, strict=True)),
        "recall_ceiling": pytest.approx(
            sum(found / len(row) for row, found in zip(rows, seen, strict=True) if row) / len(rows),
            rel=1e-6,
        ),
        "in_train": sum(normal(text) in known for text in texts),
    }


def as_python(found):
    """A dataclass of facts with Counters for distributions."""
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    for name, value in values.items():
        if isinstance(value, stats.Distribution):
            values[name] = {v: int(n) for v, n in enumerate(value.counts) if n}
    return values


@pytest.mark.parametrize(
    "seed,valid,pictures", [(0, True, True), (1, False, True), (2, True, False)]
)
def test_facts_are_those_that_python_counts(tmp_path, monkeypatch, seed, valid, pictures):
    monkeypatch.setattr(stats, "_BLOCK", 7)
    raw = make_raw(seed, valid=valid, pictures=pictures)
    dataset = prepare(raw, tmp_path / "set", propensity_a=0.5, propensity_b=1.5)
    found = stats.measure(dataset)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(dataset.tokenizer)
    tokenizer.no_truncation()
    rows = {
        name: [set(row.indices.tolist()) for row in split.relevance]
        for name, split in raw.splits.items()
    }
    kept = [i for i, row in enumerate(rows["train"]) if row]
    assert 0 < len(kept) < len(rows["train"])
    texts, have = {}, {}
    for name, items in {
        **{n: s.items for n, s in raw.splits.items()},
        "labels": raw.labels,
    }.items():
        texts[name] = [text for chunk in items.read_texts() for text in chunk]
        offsets = None if items.images is None else items.images.offsets(np.arange(items.count))
        have[name] = None if offsets is None else np.diff(offsets).tolist()
    rows["train"], texts["train"] = ([held["train"][i] for i in kept] for held in (rows, texts))
    if pictures:
        have["train"] = [have["train"][i] for i in kept]
    frequency = collections.Counter(label for row in rows["train"] for label in row)
    known = {normal(text) for text in texts["train"]} - {""}

    assert list(found.parts) == ["train", *["valid"] * valid, "test", "labels"]
    assert list(found.splits) == list(found.parts)[:-1]
    for name, part in found.parts.items():
        assert as_python(part) == expected_part(texts[name], tokenizer, have[name], 8)
    for name, split in found.splits.items():
        others = set() if name == "train" else known
        assert as_python(split) == expected_split(rows[name], frequency, texts[name], others)
    assert found.splits["test"].hopeless and found.splits["test"].in_train
    assert (
        found.parts["train"].empty and found.parts["train"].repeated and found.parts["train"].lost
    )
    assert as_python(found)["frequencies"] == collections.Counter(
        frequency[label] for label in range(40)
    )
    n = len(kept)
    weights = [
        1 + (np.log(n) - 1) * 2.5**0.5 * (frequency[label] + 1.5) ** -0.5 for label in range(40)
    ]
    assert found.inverse_propensity == pytest.approx((min(weights), max(weights)), rel=1e-5)
    lengths = {name: [len(tokenizer.encode(t).ids) for t in texts[name]] for name in texts}
    assert found.suggested_max_tokens == max(
        min(
            m
            for m in lengths[name]
            if sum(x <= m for x in lengths[name]) >= 0.99 * len(texts[name])
        )
        for name in ("train", "labels")
    )


@pytest.mark.parametrize("seed", range(3))
def test_distribution(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 30, rng.integers(1, 300)) ** 2
    found = stats.Distribution.of(values)
    assert (found.items, found.total, found.maximum) == (len(values), values.sum(), values.max())
    assert found.mean == pytest.approx(values.mean())
    for percent in (1, 50, 95, 99, 100):
        ordered = sorted(values)
        enough = [v for i, v in enumerate(ordered) if 100 * (i + 1) >= percent * len(ordered)]
        assert found.percentile(percent) == enough[0]
    assert found.between(4, 25).items == np.sum((values >= 4) & (values <= 25))
    assert found.between(25, None).total == values[values >= 25].sum()
    nothing = stats.Distribution.of(np.zeros(0, np.int64))
    assert (nothing.items, nothing.mean, nothing.maximum, nothing.percentile(99)) == (0, 0.0, 0, 0)


def test_groups_begin_and_end_where_they_say(tmp_path):
    frequency = [101, 100, 6, 5, 1, 0]
    train = np.arange(101)[:, None] < frequency
    test = np.eye(6)[[0, 0, 1, 2, 3, 4, 5, 5, 5]]
    texts = RawItems(101, lambda: [["a"] * 101])
    raw = RawDataset(
        name="groups",
        fingerprint={"path": "here"},
        labels=RawItems(6, lambda: [list("abcdef")]),
        train=RawQueries(texts, canonical(sparse.csr_matrix(train.astype(np.float32)))),
        test=RawQueries(
            RawItems(9, lambda: [list("zyxwvutsr")]),
            canonical(sparse.csr_matrix(test.astype(np.float32))),
        ),
    )
    dataset = prepare(raw, tmp_path / "set")
    found = stats.measure(dataset)
    assert found.splits["train"].group_pairs == {"head": 101, "torso": 106, "tail": 6, "unseen": 0}
    assert found.splits["test"].group_pairs == {"head": 2, "torso": 2, "tail": 2, "unseen": 3}
    assert found.splits["test"].hopeless == 3
    assert found.splits["test"].recall_ceiling == pytest.approx(6 / 9)
    rows = table(card.describe(dataset, found), "group")
    assert rows == [
        ["head", "101 or more", "1", "16.7 %", "47.4 %", "22.2 %"],
        ["torso", "6 to 100", "2", "33.3 %", "49.8 %", "22.2 %"],
        ["tail", "1 to 5", "2", "33.3 %", "2.8 %", "22.2 %"],
        ["unseen", "none", "1", "16.7 %", "0 %", "33.3 %"],
    ]
    page = " ".join(card.describe(dataset, found).split())
    assert "1 labels are never seen in training. They are in 3 of the 9 test pairs" in page
    assert "all labels of 3 test queries" in page and "recall on test of 66.67 % at most" in page


def table(page, first):
    """Cells of the rows of the table whose header begins so."""
    block = next(block for block in page.split("\n\n") if re.match(rf"\| {first} *\|", block))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.split("\n")[2:]]


def test_the_page_says_the_facts(tmp_path):
    raw = make_raw(3, name="a_b|c", warnings=("12 rows | of <x> are `odd`",))
    dataset = prepare(raw, tmp_path / "set")
    found = stats.measure(dataset)
    page = card.describe(dataset, found)
    assert page.startswith("# a_b\\|c\n\n")
    sizes = table(page, "")
    assert [row[0] for row in sizes] == ["train", "valid", "test", "labels"]
    tokens = found.parts["test"].tokens
    assert sizes[2] == [
        "test", "63", str(raw.test.relevance.nnz), str(found.parts["test"].empty),
        f"{tokens.mean:.1f}", str(tokens.percentile(50)), str(tokens.percentile(95)),
        str(tokens.maximum), stats.percent(found.parts["test"].cut, 63),
        stats.percent(found.parts["test"].lost, tokens.total),
    ]  # fmt: skip
    assert f"`--max_tokens={found.suggested_max_tokens}`" in page
    histogram = table(page, "queries with")
    assert histogram[0][0] == "none" and histogram[0][1] == "0 %" != histogram[0][3]
    assert "6 to 10" in [row[0] for row in histogram]
    assert f"{dataset.info['train_without_labels_dropped']} training queries without" in page
    assert "- 12 rows \\| of \\<x\\> are \\`odd\\`" in page
    assert "## Filter pairs\n\nNone." in page
    assert "- source: /where/it/was\n" in page and "- max_tokens: 8\n" in page
    assert f"- content_hash: {dataset.content_hash}" in page
    assert "A = 0.6, B = 2.6" in page
    assert page.count("\n") < 120
    plain = prepare(make_raw(3, pictures=False), tmp_path / "plain")
    assert "\n## Pictures\n\nNone.\n" in card.describe(plain, stats.measure(plain))


def test_examples_are_queries_and_their_labels(tmp_path):
    raw = make_raw(4)
    dataset = prepare(raw, tmp_path / "set")
    page = card.describe(dataset, stats.measure(dataset))
    lines = page.split("## Examples\n\n")[1].split("\n\n")[0].split("\n")
    assert len(lines) == 10
    count = len(dataset.train)
    for i, (query, labels) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        row = i * count // 5
        assert query == f"- “{card.escape(dataset.train.texts[row], 80)}”"
        ids = dataset.train_relevance[row].indices
        shown = [f"“{card.escape(dataset.labels.texts[label], 80)}”" for label in ids[:5].tolist()]
        more = [f"and {len(ids) - 5} more"] if len(ids) > 5 else []
        assert labels == "  → " + "; ".join(shown + more)
    assert any(len(dataset.train_relevance[i * count // 5].indices) > 5 for i in range(5))


@pytest.mark.parametrize(
    "text,width,escaped",
    [
        ("plain text, 5 of it - 漢字", None, "plain text, 5 of it - 漢字"),
        ("a|b\\|c", None, r"a\|b\\\|c"),
        ("`x` *y* _z_ snake_case", None, r"\`x\` \*y\* \_z\_ snake_case"),
        ("<script>&amp; [a](b) ![c]", None, r"\<script\>\&amp; \[a\](b) !\[c\]"),
        ("~~no~~ $x$", None, r"\~\~no\~\~ \$x\$"),
        ("one\ntwo\r\n\tthree\u2028four\x00five\x1b", None, "one two three four five"),
        ("# title", None, r"\# title"),
        ("12. item", None, r"12\. item"),
        ("- item", None, r"\- item"),
        ("> quote", None, r"\> quote"),
        ("a" * 80, 80, "a" * 80),
        ("a" * 81, 80, "a" * 79 + "…"),
        ("|" * 81, 80, r"\|" * 79 + "…"),
    ],
)
def test_escape(text, width, escaped):
    assert card.escape(text, width) == escaped


@pytest.mark.parametrize(
    "part,whole,said",
    [(0, 5, "0 %"), (0, 0, "0 %"), (5, 5, "100 %"), (1, 3, "33.3 %"), (1, 10**6, "<0.1 %"),
     (5, 10**4, "0.1 %"), (10**6 - 1, 10**6, ">99.9 %"),
     (4, 10**4, "<0.1 %"), (9996, 10**4, ">99.9 %"), (9994, 10**4, "99.9 %")],
)  # fmt: skip
def test_a_share_is_nothing_or_all_only_if_it_is(part, whole, said):
    assert stats.percent(part, whole) == said


def test_prepare_writes_the_card_and_the_hash_is_of_the_data(tmp_path, monkeypatch):
    import PIL.Image

    out = tmp_path / "set"
    dataset = prepare(make_raw(5), out)
    page = (out / "dataset.md").read_text(encoding="utf-8")
    assert page == card.describe(dataset, stats.measure(dataset))
    assert str(tmp_path) not in page
    with PIL.Image.open(out / "dataset.png") as image:
        assert image.size == (1500, 900)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
    assert f"data card: {out / 'dataset.md'}" in preprocessing.describe(dataset)
    again = prepare(make_raw(5), tmp_path / "again")
    for name in ("dataset.md", "dataset.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    monkeypatch.setattr(card, "write", lambda *_: None)
    without = prepare(make_raw(5), tmp_path / "without")
    assert without.content_hash == again.content_hash == dataset.content_hash
    assert not (tmp_path / "without" / "dataset.md").exists()
    assert "data card" not in preprocessing.describe(without)
    assert "dataset.md" not in json.dumps(dataset.info)


def test_a_card_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("no room")

    monkeypatch.setattr(plots, "draw", fail)
    with pytest.raises(InputError, match="no room"):
        prepare(make_raw(6), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name,change",
    [("漢字", ""), ("$\\frac$ 100 %", "one label"), ("plain", "long"), ("plain", "no test")],
)
def test_any_name_and_any_shape_can_be_drawn(tmp_path, name, change):
    """Without a warning, of a letter that the font lacks for one."""
    import PIL.Image

    raw = make_raw(0, valid=False, pictures=False, name=name)
    if change == "one label":
        ones = canonical(sparse.csr_matrix(np.ones((153, 1), np.float32)))
        raw = dataclasses.replace(
            raw,
            labels=RawItems(1, lambda: [["only"]]),
            train=RawQueries(raw.train.items, ones),
            test=RawQueries(raw.test.items, ones[:63]),
        )
    if change == "long":
        items = RawItems(153, lambda: [["red " * 5000] * 153])
        raw = dataclasses.replace(raw, train=RawQueries(items, raw.train.relevance))
    if change == "no test":
        nothing = canonical(sparse.csr_matrix((0, 40), dtype=np.float32))
        raw = dataclasses.replace(raw, test=RawQueries(RawItems(0, lambda: [[]]), nothing))
    prepare(raw, tmp_path / "set")
    with PIL.Image.open(tmp_path / "set" / "dataset.png") as image:
        assert image.size == (1500, 900)
    page = (tmp_path / "set" / "dataset.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {card.escape(name)}\n") and "nan" not in page


def test_texts_in_chunks(tmp_path):
    dataset = prepare(make_raw(7), tmp_path / "set")
    texts = PreparedDataset.open(tmp_path / "set").train.texts
    for rows in (1, 7, 1 << 14):
        chunks = list(texts.chunks(rows))
        assert [text for chunk in chunks for text in chunk] == list(dataset.train.texts)
        assert all(len(chunk) == rows for chunk in chunks[:-1]) and len(chunks[-1]) <= rows


def test_texts_read_in_chunks_take_no_memory_later(tmp_path):
    """Pages of a mapped file count as the process's own until they are let go."""
    prepare(make_raw(8), tmp_path / "set")
    gc.collect()  # What it had mapped itself.
    texts = PreparedDataset.open(tmp_path / "set").train.texts

    def resident():
        with open("/proc/self/smaps") as file:
            parts = file.read().split(str(tmp_path / "set" / "train_texts.npy"))
        return [int(re.search(r"Rss: +(\d+) kB", part)[1]) for part in parts[1:]]

    assert texts[0] + texts[-1] and sum(resident()) > 0
    collections.deque(texts.chunks(), maxlen=0)
    assert resident() == [0]
