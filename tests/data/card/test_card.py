"""The data card: its statistics recomputed in Python, its text, and that it is deterministic."""

import collections
import dataclasses
import gc
import json
import re
import unicodedata

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import preprocessing, summary
from vixml_jax.data.card import card, plots, stats
from vixml_jax.data.images.image_embeddings import RawImages
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

WORDS = "red Green blue CAR house tree Straße naïve 漢字 ｗｉｄｅ x1".split()


def make_raw(seed, *, valid=True, item_images=True, name="random", warnings=()):
    """A random source with few distinct texts; many are empty or differ only in their case."""
    rng = np.random.default_rng(seed)

    def texts(count):
        made = [" ".join(rng.choice(WORDS, rng.integers(0, 4))) for _ in range(count)]
        made += [" ".join(rng.choice(WORDS, 30)) for _ in range(3)]
        styles = [str, str.upper, lambda text: f" {text}\t", lambda text: text.replace(" ", "  ")]
        return [styles[rng.integers(len(styles))](text) for text in made]

    def items(count, with_images):
        made = texts(count)
        count = len(made)
        images = None
        if with_images:
            present = rng.random((count, 3)) < 0.4
            images = RawImages(np.ones((count, 3, 2), np.float16), present, "made")
        return RawItems(count, lambda: [made[:7], made[7:]], images)

    def queries(count, with_images, train=False):
        drawn = items(count, with_images)
        dense = rng.random((drawn.count, 40)) < np.maximum(np.linspace(0, 0.3, 40) ** 1.5, 0.03)
        if train:
            dense[0, 10:20] = True  # More labels than an example lists.
            dense[:, :6] = False  # Labels that do not occur in training.
        else:
            dense[::9, 6:] = False  # Queries with only such labels.
            dense[9, 2] = True
        dense[4] = False
        return RawQueries(drawn, canonical(sparse.csr_matrix(dense.astype(np.float32))))

    return RawDataset(
        name=name,
        fingerprint={"path": "/where/it/was"},
        labels=items(37, False),
        train=queries(150, item_images, train=True),
        test=queries(60, item_images),
        valid=queries(30, False) if valid else None,
        warnings=warnings,
    )


def prepare(raw, out, **options):
    settings = {"max_tokens": 8, "vocab_size": 64, "filters": "none", **options}
    return preprocessing.prepare(raw, str(out), preprocessing.Settings(**settings))


def normal(text):
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def expected_part(texts, tokenizer, item_images, max_tokens):
    """The statistics of a part, computed in plain Python."""
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    counts = collections.Counter(map(normal, texts))
    groups = [count for text, count in counts.items() if text and count > 1]
    return {
        "tokens": collections.Counter(lengths),
        "truncated_texts": sum(length > max_tokens for length in lengths),
        "truncated_tokens": sum(max(length - max_tokens, 0) for length in lengths),
        "empty": counts[""],
        "repeated": sum(groups),
        "distinct": len(groups),
        "images": None if item_images is None else collections.Counter(item_images),
    }


def expected_split(rows, frequency, texts, train_texts):
    """The statistics of a split; `rows` are sets of labels."""
    groups = collections.Counter()
    for row in rows:
        for label in row:
            count = frequency[label]
            group = "head" if count > 100 else "torso" if count > 5 else "tail"
            groups[group if count else "unseen"] += 1
    seen = [sum(frequency[label] > 0 for label in row) for row in rows]
    return {
        "labels": collections.Counter(map(len, rows)),
        "group_pairs": {name: groups[name] for name, _, _ in stats.GROUPS},
        "only_unseen": sum(bool(row) and not count for row, count in zip(rows, seen, strict=True)),
        "recall_ceiling": pytest.approx(
            sum(count / len(row) for row, count in zip(rows, seen, strict=True) if row) / len(rows),
            rel=1e-6,
        ),
        "in_train": sum(normal(text) in train_texts for text in texts),
    }


def as_python(statistics):
    """The fields of a dataclass, with dictionaries for distributions."""
    values = {
        field.name: getattr(statistics, field.name) for field in dataclasses.fields(statistics)
    }
    for name, value in values.items():
        if isinstance(value, stats.Distribution):
            values[name] = {v: int(n) for v, n in enumerate(value.counts) if n}
    return values


@pytest.mark.parametrize(
    "seed,valid,item_images", [(0, True, True), (1, False, True), (2, True, False)]
)
def test_statistics_match_plain_python(tmp_path, monkeypatch, seed, valid, item_images):
    monkeypatch.setattr(stats, "_BLOCK", 7)
    raw = make_raw(seed, valid=valid, item_images=item_images)
    dataset = prepare(raw, tmp_path / "set", propensity_a=0.5, propensity_b=1.5)
    measured = stats.measure(dataset)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(dataset.tokenizer)
    tokenizer.no_truncation()
    rows = {
        name: [set(row.indices.tolist()) for row in split.relevance]
        for name, split in raw.splits.items()
    }
    kept = [i for i, row in enumerate(rows["train"]) if row]
    assert 0 < len(kept) < len(rows["train"])
    texts, images = {}, {}
    for name, items in {
        **{n: s.items for n, s in raw.splits.items()},
        "labels": raw.labels,
    }.items():
        texts[name] = [text for chunk in items.read_texts() for text in chunk]
        offsets = None if items.images is None else items.images.offsets(np.arange(items.count))
        images[name] = None if offsets is None else np.diff(offsets).tolist()
    rows["train"], texts["train"] = ([held["train"][i] for i in kept] for held in (rows, texts))
    if item_images:
        images["train"] = [images["train"][i] for i in kept]
    frequency = collections.Counter(label for row in rows["train"] for label in row)
    train_texts = {normal(text) for text in texts["train"]} - {""}

    assert list(measured.parts) == ["train", *["valid"] * valid, "test", "labels"]
    assert list(measured.splits) == list(measured.parts)[:-1]
    for name, part in measured.parts.items():
        assert as_python(part) == expected_part(texts[name], tokenizer, images[name], 8)
    for name, split in measured.splits.items():
        compared = set() if name == "train" else train_texts
        assert as_python(split) == expected_split(rows[name], frequency, texts[name], compared)
    assert measured.splits["test"].only_unseen and measured.splits["test"].in_train
    train = measured.parts["train"]
    assert train.empty and train.repeated and train.truncated_tokens
    assert as_python(measured)["frequencies"] == collections.Counter(
        frequency[label] for label in range(40)
    )
    n = len(kept)
    weights = [
        1 + (np.log(n) - 1) * 2.5**0.5 * (frequency[label] + 1.5) ** -0.5 for label in range(40)
    ]
    assert measured.inverse_propensity == pytest.approx((min(weights), max(weights)), rel=1e-5)
    lengths = {name: [len(tokenizer.encode(t).ids) for t in texts[name]] for name in texts}
    assert measured.suggested_max_tokens == max(
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
    drawn = stats.Distribution.of(values)
    assert (drawn.items, drawn.total, drawn.maximum) == (len(values), values.sum(), values.max())
    assert drawn.mean == pytest.approx(values.mean())
    for percent in (1, 50, 95, 99, 100):
        ordered = sorted(values)
        enough = [v for i, v in enumerate(ordered) if 100 * (i + 1) >= percent * len(ordered)]
        assert drawn.percentile(percent) == enough[0]
    assert drawn.between(4, 25).items == np.sum((values >= 4) & (values <= 25))
    assert drawn.between(25, None).total == values[values >= 25].sum()
    empty = stats.Distribution.of(np.zeros(0, np.int64))
    assert (empty.items, empty.mean, empty.maximum, empty.percentile(99)) == (0, 0.0, 0, 0)


def test_limits_of_label_groups(tmp_path):
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
    measured = stats.measure(dataset)
    train_split, test_split = measured.splits["train"], measured.splits["test"]
    assert train_split.group_pairs == {"head": 101, "torso": 106, "tail": 6, "unseen": 0}
    assert test_split.group_pairs == {"head": 2, "torso": 2, "tail": 2, "unseen": 3}
    assert test_split.only_unseen == 3
    assert test_split.recall_ceiling == pytest.approx(6 / 9)
    rows = table(card.describe(dataset, measured), "group")
    assert rows == [
        ["head", "101 or more", "1", "16.7 %", "47.4 %", "22.2 %"],
        ["torso", "6 to 100", "2", "33.3 %", "49.8 %", "22.2 %"],
        ["tail", "1 to 5", "2", "33.3 %", "2.8 %", "22.2 %"],
        ["unseen", "none", "1", "16.7 %", "0 %", "33.3 %"],
    ]
    page = " ".join(card.describe(dataset, measured).split())
    assert "1 labels do not occur in training. They are in 3 of the 9 test pairs" in page
    assert "3 test queries have only such labels" in page
    assert "recall of at most 66.67 % on the test split" in page


def table(page, first):
    """Cells of the table whose first header is `first`."""
    block = next(block for block in page.split("\n\n") if re.match(rf"\| {first} *\|", block))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.split("\n")[2:]]


def test_page_has_the_statistics(tmp_path):
    raw = make_raw(3, name="a_b|c", warnings=("12 rows | of <x> are `odd`",))
    raw = dataclasses.replace(raw, notes=("2 rows | had no text",))
    dataset = prepare(raw, tmp_path / "set")
    measured = stats.measure(dataset)
    page = card.describe(dataset, measured)
    assert page.startswith("# a_b\\|c\n\n")
    sizes = table(page, "")
    assert [row[0] for row in sizes] == ["train", "valid", "test", "labels"]
    part = measured.parts["test"]
    assert sizes[2] == [
        "test", "63", str(raw.test.relevance.nnz), str(part.empty),
        f"{part.tokens.mean:.1f}", str(part.tokens.percentile(50)),
        str(part.tokens.percentile(95)), str(part.tokens.maximum),
        stats.percent(part.truncated_texts, 63),
        stats.percent(part.truncated_tokens, part.tokens.total),
    ]  # fmt: skip
    assert f"`--max_tokens={measured.suggested_max_tokens}`" in page
    histogram = table(page, "labels per query")
    assert histogram[0][0] == "none" and histogram[0][1] == "0 %" != histogram[0][3]
    assert "6 to 10" in [row[0] for row in histogram]
    assert f"{dataset.info['train_without_labels_dropped']} training queries without" in page
    dropped = dataset.info["train_without_labels_dropped"]
    assert dropped and (
        f"- {153 + 33 + 63} queries read: {153 - dropped} train, 33 valid, 63 test, "
        f"{dropped} left out, because no label is left for them\n- 2 rows \\| had no text" in page
    )
    assert "- 12 rows \\| of \\<x\\> are \\`odd\\`" in page
    assert "## Filter pairs\n\nNone." in page
    assert "- source: /where/it/was\n" in page and "- max_tokens: 8\n" in page
    assert f"- content_hash: {dataset.content_hash}" in page
    assert "A = 0.6, B = 2.6" in page
    assert page.count("\n") < 120
    plain = prepare(make_raw(3, item_images=False), tmp_path / "plain")
    assert "\n## Images\n\nNone.\n" in card.describe(plain, stats.measure(plain))


def test_examples_are_queries_with_their_labels(tmp_path):
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
    "part,total,expected",
    [(0, 5, "0 %"), (0, 0, "0 %"), (5, 5, "100 %"), (1, 3, "33.3 %"), (1, 10**6, "<0.1 %"),
     (5, 10**4, "0.1 %"), (10**6 - 1, 10**6, ">99.9 %"),
     (4, 10**4, "<0.1 %"), (9996, 10**4, ">99.9 %"), (9994, 10**4, "99.9 %")],
)  # fmt: skip
def test_percent_is_0_or_100_only_if_exact(part, total, expected):
    assert stats.percent(part, total) == expected


def test_prepare_writes_the_card_and_the_hash_does_not_depend_on_it(tmp_path, monkeypatch):
    import PIL.Image

    out = tmp_path / "set"
    dataset = prepare(make_raw(5), out)
    page = (out / "dataset.md").read_text(encoding="utf-8")
    assert page == card.describe(dataset, stats.measure(dataset))
    assert str(tmp_path) not in page
    with PIL.Image.open(out / "dataset.png") as image:
        assert image.size == (plots.WIDTH, 4 * plots.PANEL_HEIGHT)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
    assert f"data card: {out / 'dataset.md'}" in summary.describe(dataset)
    again = prepare(make_raw(5), tmp_path / "again")
    for name in ("dataset.md", "dataset.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    monkeypatch.setattr(card, "write", lambda *_: None)
    without = prepare(make_raw(5), tmp_path / "without")
    assert without.content_hash == again.content_hash == dataset.content_hash
    assert not (tmp_path / "without" / "dataset.md").exists()
    assert "data card" not in summary.describe(without)
    assert "dataset.md" not in json.dumps(dataset.info)


def test_error_while_the_card_is_written(tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("disk full")

    monkeypatch.setattr(plots, "draw", fail)
    with pytest.raises(InputError, match="disk full"):
        prepare(make_raw(6), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_texts_of_the_figure_are_legible_on_a_phone_and_do_not_overlap(tmp_path, monkeypatch):
    """At a width of 390 pixels the smallest text is 9 pixels high, and none is cut off."""
    from matplotlib import figure, text

    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, path: (save(self, path), drawn.append(self))
    )
    name = "a name of a data set that is not short"
    prepare(make_raw(0, name=name), tmp_path / "set")
    (made,) = drawn
    assert made.get_facecolor() == (1, 1, 1, 1)  # Legible on a dark page too.
    shown = [x for x in made.findobj(text.Text) if x.get_visible() and x.get_text().strip()]
    assert any(name in " ".join(x.get_text().split()) for x in shown)
    for one in shown:
        assert one.get_fontsize() * made.dpi / 72 * 390 / plots.WIDTH >= 9, one
    width, height = made.canvas.get_width_height()
    titles = [made._suptitle, *(axes._left_title for axes in made.axes)]
    for one in titles:
        assert one in shown
        box = one.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, one


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name,change",
    [("漢字", ""), ("$\\frac$ 100 %", "one label"), ("plain", "long"), ("plain", "no test")],
)
def test_figure_of_unusual_data_sets(tmp_path, name, change):
    """Draws without warnings, such as those about letters that the font lacks."""
    import PIL.Image

    raw = make_raw(0, valid=False, item_images=False, name=name)
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
        assert image.size == (plots.WIDTH, 3 * plots.PANEL_HEIGHT)
    page = (tmp_path / "set" / "dataset.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {card.escape(name)}\n") and "nan" not in page


def test_chunks_have_all_texts(tmp_path):
    dataset = prepare(make_raw(7), tmp_path / "set")
    texts = PreparedDataset.open(tmp_path / "set").train.texts
    for rows in (1, 7, 1 << 14):
        chunks = list(texts.chunks(rows))
        assert [text for chunk in chunks for text in chunk] == list(dataset.train.texts)
        assert all(len(chunk) == rows for chunk in chunks[:-1]) and len(chunks[-1]) <= rows


def test_chunks_release_their_memory(tmp_path):
    """Pages of a mapped file count as memory of the process until they are released."""
    prepare(make_raw(8), tmp_path / "set")
    gc.collect()  # Unmaps the files that `prepare` opened.
    texts = PreparedDataset.open(tmp_path / "set").train.texts

    def resident():
        with open("/proc/self/smaps") as file:
            parts = file.read().split(str(tmp_path / "set" / "train_texts.npy"))
        return [int(re.search(r"Rss: +(\d+) kB", part)[1]) for part in parts[1:]]

    assert texts[0] + texts[-1] and sum(resident()) > 0
    collections.deque(texts.chunks(), maxlen=0)
    assert resident() == [0]
