"""Panels of the figure: percentages and ranks, counted again in plain Python."""

import collections

import numpy as np
import pytest

from tests.data.card.test_card import make_raw, prepare
from vixml_jax.data.card import panels, stats


def expected_bars(values, width, end, overflow):
    """Percent of the values in bars of `width` numbers, and those above `end` in a last bar."""
    counts = collections.Counter(min(value // width, end // width + 1) for value in values)
    return [100 * counts[bar] / len(values) for bar in range(end // width + 1 + overflow)]


@pytest.mark.parametrize("seed,valid,item_images", [(0, True, True), (1, False, False)])
def test_panels_match_plain_python(tmp_path, seed, valid, item_images):
    raw = make_raw(seed, valid=valid, item_images=item_images)
    dataset = prepare(raw, tmp_path / "set")
    found = panels.measure(dataset)
    splits = ["train", *["valid"] * valid, "test"]
    lengths = {name: getattr(dataset, name).full_lengths for name in ("train", "test", "labels")}
    labels = {name: np.diff(getattr(dataset, f"{name}_relevance").indptr) for name in splits}
    expected = {"tokens": lengths, "labels": labels}
    if item_images:
        expected["images"] = {
            name: np.diff(getattr(dataset, name).images.offsets)
            for name in splits
            if name != "valid"
        }
    else:
        assert found.images is None
    for name, values in expected.items():
        panel = getattr(found, name)
        assert list(panel.heights) == list(values)
        assert panel.overflow == any(max(x) > panel.end for x in values.values())
        assert panel.overflow == ("last bar: all larger numbers" in panel.xlabel)
        for part, numbers in values.items():
            bars = expected_bars(numbers.tolist(), panel.width, panel.end, panel.overflow)
            np.testing.assert_allclose(panel.heights[part], bars)
            assert sum(bars) == pytest.approx(100)
            # At least 99 % of the items have bars of their own.
            assert np.mean(numbers <= panel.end) >= 0.99
    truncated = [np.mean(lengths[name] > dataset.max_tokens) for name in ("train", "labels")]
    shares = [stats.percent(share, 1) for share in truncated]
    assert found.tokens.title == (
        f"8 tokens truncate {shares[0]} of training queries and {shares[1]} of labels"
    )

    frequency = np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)
    ranked = sorted((int(n) for n in frequency if n), reverse=True)
    drawn = found.frequencies
    for first, last, queries in zip(
        drawn.ranks[::2], drawn.ranks[1::2], drawn.queries[::2], strict=True
    ):
        assert set(ranked[first - 1 : last]) == {queries}
        assert ranked.count(queries) == last - first + 1
    assert drawn.ranks[-1] == len(ranked)
    assert sum(count for count, _ in drawn.groups.values()) == dataset.num_labels
    tail = [n for n in ranked if n <= 5]
    if tail:
        of_pairs = stats.percent(sum(tail), sum(ranked))
        assert drawn.groups["tail"] == (
            len(tail),
            f"tail (1 to 5): {len(tail)} labels, {of_pairs} of pairs",
        )


def test_many_numbers_share_bars():
    values = {"train": np.arange(1000), "test": np.arange(0, 3000, 3)}
    shown = {name: stats.Distribution.of(x) for name, x in values.items()}
    panel = panels._histogram("t", "x", "y", shown)
    assert len(panel.heights["train"]) <= panels.MAX_BARS + 2 and panel.overflow
    for name, numbers in values.items():
        bars = expected_bars(numbers.tolist(), panel.width, panel.end, True)
        np.testing.assert_allclose(panel.heights[name], bars)
