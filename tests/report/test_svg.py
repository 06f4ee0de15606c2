"""Charts: shapes proportional to values, readable scales, escaped texts."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vixml_jax.report import svg

HOSTILE = '<script>alert("1")</script> & "quotes"'


def parse(figure):
    """Parses a figure, which must be well-formed; returns the figure and its chart."""
    root = ET.fromstring(figure)
    chart = root.find("svg")
    assert chart.attrib["role"] == "img"
    title, description = chart.find("title"), chart.find("desc")
    assert chart.attrib["aria-labelledby"].split() == [title.get("id"), description.get("id")]
    return root, chart


def shapes(chart, kind):
    return [shape for shape in chart if shape.get("class") == kind]


def test_bars_are_proportional_to_values():
    series = {"one": {"head": 80.0, "tail": 20.0}, "two": {"head": 40.0, "tail": 0.0}}
    root, chart = parse(svg.bars("R@100", "described", series))
    assert root.find("figcaption").text == chart.find("title").text == "R@100"
    assert [item.find("svg").tail for item in root.find("ul")] == ["one", "two"]
    lengths = [[float(b.get("width")) for b in shapes(chart, f"s{i}")] for i in range(2)]
    assert lengths[0][0] / lengths[0][1] == pytest.approx(4, rel=0.01)
    assert lengths[0][0] / lengths[1][0] == pytest.approx(2, rel=0.01)
    assert lengths[1][1] == 1.0  # A value of 0 still has a visible bar.
    texts = [text.text for text in chart.iter("text")]
    assert texts == ["head", "80.0", "40.0", "tail", "20.0", "0.0"]


def test_columns_are_proportional_to_values_and_may_be_missing():
    series = {"one": [8.0, None, 4.0], "two": [2.0, 6.0, 0.0]}
    _, chart = parse(
        svg.columns("P@5", "described", series, ["1", "2", "3"], xlabel="decile", ylabel="percent")
    )
    heights = [[float(b.get("height")) for b in shapes(chart, f"s{i}")] for i in range(2)]
    assert len(heights[0]) == 2
    assert heights[0][0] == pytest.approx(150) and heights[0][1] == 75
    assert [round(value / 150 * 8, 2) for value in heights[1]] == [2.0, 6.0, 0.0]
    bottoms = {
        round(float(b.get("y")) + float(b.get("height")), 1)
        for i in range(2)
        for b in shapes(chart, f"s{i}")
    }
    assert len(bottoms) == 1
    lefts = sorted(float(b.get("x")) for i in range(2) for b in shapes(chart, f"s{i}"))
    assert min(b - a for a, b in itertools.pairwise(lefts)) > 10  # Columns do not overlap.


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("from_zero", [False, True])
def test_heights_of_lines_follow_the_axis(log_y, from_zero):
    if log_y and from_zero:
        return  # There is no 0 on a logarithmic axis.
    points = [(0.0, 10.0), (1.0, 100.0), (2.0, 1000.0)]
    _, chart = parse(
        svg.lines("t", "d", {"a": points}, xlabel="x", ylabel="y", log_y=log_y, from_zero=from_zero)
    )  # fmt: skip
    ticks = {float(t.text): float(t.get("y")) - 4 for t in shapes(chart, "end")}
    heights = [float(mark.get("cy")) for mark in shapes(chart, "m0")]
    assert (0.0 in ticks) == from_zero
    if log_y:
        assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.1)
        assert ticks[100.0] == pytest.approx(heights[1], abs=0.1)
    else:
        least = 0.0 if from_zero else 10.0
        height = (heights[0] - heights[1]) / (heights[0] - heights[2])
        assert height == pytest.approx(90 / 990, abs=0.01)
        bottom = heights[2] + 160.0  # Of the axis.
        assert (bottom - heights[1]) / 160 == pytest.approx(
            (100 - least) / (1000 - least), abs=0.01
        )


@pytest.mark.parametrize("log_x", [False, True])
def test_lines_pass_through_their_points(log_x):
    points = [(10.0, 0.5), (100.0, 0.75), (1000.0, 1.0)]
    _, chart = parse(
        svg.lines("t", "d", {"a": points}, xlabel="x", ylabel="y", log_x=log_x)
    )  # fmt: skip
    (path,) = shapes(chart, "l0")
    numbers = [float(n) for n in re.findall(r"[\d.]+", path.get("d"))]
    xs, ys = numbers[::2], numbers[1::2]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2]) and ys[0] > ys[2]
    middle = (xs[1] - xs[0]) / (xs[2] - xs[0])
    assert middle == pytest.approx(0.5 if log_x else 90 / 990, abs=0.01)
    assert len(shapes(chart, "m0")) == 3


def test_series_have_different_marks():
    rows = {name: [(0.0, float(i)), (1.0, i + 1.0)] for i, name in enumerate("abcdef")}
    _, chart = parse(svg.lines("t", "d", rows, xlabel="x", ylabel="y"))
    marks = [shapes(chart, f"m{i}")[0] for i in range(svg.MAX_LINES)]
    # Without their places: an inverted triangle has the path of one, turned over.
    marks = {(mark.tag, re.sub(r"M\S+ \S+", "", mark.get("d", ""))) for mark in marks}
    assert len(marks) == svg.MAX_LINES == 6
    with pytest.raises(ValueError, match="expected at most 6 series, found 7"):
        svg.lines("t", "d", rows | {"g": rows["a"]}, xlabel="x", ylabel="y")
    with pytest.raises(ValueError, match="expected at most 3 series, found 4"):
        svg.bars("t", "d", {name: {"g": 1.0} for name in "abcd"})


def test_a_series_keeps_its_number_where_others_are_missing():
    points = [(0.0, 1.0), (1.0, 2.0)]
    series = {"b": points, "e": points}
    root, chart = parse(svg.lines("t", "d", series, xlabel="x", ylabel="y", numbers=[1, 4]))
    assert [len(shapes(chart, f"l{i}")) for i in range(6)] == [0, 1, 0, 0, 1, 0]
    drawn = [item.find("svg/path").get("class") for item in root.find("ul")]
    assert drawn == ["l1", "l4"]
    root, _ = parse(svg.lines("t", "d", {"b": points}, xlabel="x", ylabel="y", numbers=[1]))
    assert [item.find("svg").tail for item in root.find("ul")] == ["b"]


def test_intervals_are_where_their_values_are():
    rows = {"P@1": (1.5, -0.5, 2.0), HOSTILE: (-3.0, -4.0, 1.0), "R@10": (6.0, 5.0, 7.0)}
    _, chart = parse(
        svg.intervals("t", "d", rows, xlabel="points", series=[0, 3, 3], with_zero=True)
    )
    lines = [shape for shape in chart if shape.get("class") in ("i0", "i3")]
    ends = [[float(x) for x in re.findall(r"[MH]([\d.]+)", line.get("d"))] for line in lines]
    (zero,) = shapes(chart, "zero")
    zero = float(re.match(r"M([\d.]+)", zero.get("d"))[1])
    scale = (ends[2][1] - ends[2][0]) / 2.0
    for (_, low, high), found in zip(rows.values(), ends, strict=True):
        assert found == pytest.approx([zero + scale * low, zero + scale * high], abs=0.3)
    mark = chart.find("g/circle")
    assert float(mark.get("cx")) == pytest.approx(zero + scale * 1.5, abs=0.3)
    assert chart.findall("g/title")[1].text == f"{HOSTILE}: -3.00 [-4.00, 1.00]"


@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, 99.99, 100.0, 123456.0])
def test_extreme_values_fit(value):
    parse(svg.bars("t", "d", {"a": {"g": value}}))
    parse(svg.columns("t", "d", {"a": [value, None]}, ["1", "2"], xlabel="x", ylabel="y"))
    _, chart = parse(svg.lines("t", "d", {"a": [(1.0, value)]}, xlabel="x", ylabel="y"))
    (mark,) = shapes(chart, "m0")
    assert 0 <= float(mark.get("cx")) <= svg.WIDTH


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 6))
def test_ticks_are_round_and_within_the_range(low, size, count):
    ticks = svg._ticks(low, low + size, count)
    assert 2 <= len(ticks) <= 2 * count + 1
    slack = 1e-6 * (abs(low) + size)
    assert low - slack <= ticks[0] and ticks[-1] <= low + size + slack
    assert svg._top([size]) >= size * (1 - 1e-6)


def test_texts_are_escaped():
    for figure in (
        svg.bars(HOSTILE, HOSTILE, {HOSTILE: {HOSTILE: 1.0}, "b": {HOSTILE: 2.0}}, unit=HOSTILE),
        svg.columns(
            HOSTILE, HOSTILE, {HOSTILE: [1.0], "b": [1.0]}, [HOSTILE],
            xlabel=HOSTILE, ylabel=HOSTILE,
        ),
        svg.lines(HOSTILE, HOSTILE, {HOSTILE: [(0.0, 1.0)]}, xlabel=HOSTILE, ylabel=HOSTILE),
    ):  # fmt: skip
        root, _ = parse(figure)
        assert not list(root.iter("script"))
        assert root.find("figcaption").text == HOSTILE


@settings(max_examples=100, deadline=None)
@given(st.floats(-2, 7), st.floats(0.01, 9))
def test_logarithmic_ticks_are_round_and_few(low, size):
    ticks = svg._log_ticks(low, low + size)
    assert 2 <= len(ticks) <= 10 and ticks == sorted(set(ticks))
    for tick in ticks:
        assert low - 1e-6 <= math.log10(tick) <= low + size + 1e-6
        assert size < 1 or f"{tick:e}"[:8] in ("1.000000", "2.000000", "5.000000")
