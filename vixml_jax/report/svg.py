"""Charts of reports as inline SVG: horizontal bars, vertical columns, lines, and intervals.

Series are distinguished by hatching, dashes and marks as well as by colour. Colours are CSS classes
(s0, s1 ...) that the style sheet defines for light and dark. A chart is 360 units wide, about the
width of a phone, so that its text keeps its size there.

The functions return markup with all text escaped.
"""

import html
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

WIDTH = 360
_LEFT, _RIGHT, _TOP = 40, 8, 8
_MARKS = ("circle", "square", "triangle", "diamond", "inverted triangle", "cross")  # By series.
MAX_LINES = len(_MARKS)
MAX_SERIES = 3  # Of bars and columns, which are told apart by hatching.
_NAMES = 66  # Width of the names beside intervals.
_ids = itertools.count()


def bars(
    title: str, description: str, series: Mapping[str, Mapping[str, float]], *, unit: str = ""
) -> str:
    """Returns horizontal bars with their names above; for few groups with long names.

    Args:
      title: Title of the chart.
      description: Description for screen readers.
      series: By name of the series, the value of each group; all series have the same groups.
      unit: Appended to the values.
    """
    _check(title, series)
    names = list(next(iter(series.values())))
    largest = _top(value for values in series.values() for value in values.values())
    parts, y = [], _TOP
    for name in names:
        parts.append(_text(0, y + 11, name))
        y += 17
        for i, values in enumerate(series.values()):
            width = max((WIDTH - 62) * values[name] / largest, 1.0)
            parts.append(f'<rect class="s{i}" x="0" y="{y}" width="{width:.1f}" height="13"/>')
            parts.append(_text(width + 6, y + 11, f"{values[name]:.1f}{unit}", "value"))
            y += 16
        y += 9
    return _chart(title, description, parts, y, _bar_keys(series))


def columns(
    title: str,
    description: str,
    series: Mapping[str, Sequence[float | None]],
    names: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
) -> str:
    """Returns vertical bars; for many groups with short names.

    Args:
      title: Title of the chart.
      description: Description for screen readers.
      series: By name of the series, the value of each group; None: no bar.
      names: Names of the groups.
      xlabel, ylabel: Labels of the axes.
    """
    _check(title, series)
    values = [value for row in series.values() for value in row if value is not None]
    height, largest = 150, _top(values)
    bottom = _TOP + 20 + height
    ticks = [(tick, bottom - height * tick / largest) for tick in _ticks(0.0, largest, 4)]
    parts = _y_axis(ticks, ylabel)
    group_width = (WIDTH - _LEFT - _RIGHT) / len(names)
    bar_width = 0.8 * group_width / len(series)
    for j, name in enumerate(names):
        parts.append(_text(_LEFT + (j + 0.5) * group_width, bottom + 15, name, "middle"))
        for i, row in enumerate(series.values()):
            if (value := row[j]) is None:
                continue
            x = _LEFT + (j + 0.1) * group_width + i * bar_width
            bar_height = height * value / largest
            parts.append(
                f'<rect class="s{i}" x="{x:.1f}" y="{bottom - bar_height:.1f}" '
                f'width="{bar_width - 1:.1f}" height="{bar_height:.1f}">'
                f"<title>{html.escape(name)}: {value:.2f}</title></rect>"
            )
    parts.append(_text((_LEFT + WIDTH) / 2, bottom + 33, xlabel, "middle muted"))
    return _chart(title, description, parts, bottom + 40, _bar_keys(series))


def lines(
    title: str,
    description: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    numbers: Sequence[int] | None = None,
) -> str:
    """Returns lines through the points of each series, with marks if the points are few.

    Args:
      title: Title of the chart.
      description: Description for screen readers.
      series: By name of the series, its points (x, y) in the order of x.
      xlabel, ylabel: Labels of the axes.
      log_x, log_y: Whether the axis is logarithmic.
      from_zero: Whether the y axis starts at 0, if no value is below it; not with `log_y`.
      numbers: Number of each series, which gives its colour and mark; None: from 0 on.
    """
    numbers = range(len(series)) if numbers is None else numbers
    _check(title, series, MAX_LINES)
    points = [point for row in series.values() for point in row]
    scale_x, scale_y = (math.log10 if log else float for log in (log_x, log_y))
    xs, ys = [scale_x(x) for x, _ in points], [scale_y(y) for _, y in points]
    if from_zero:
        ys.append(0.0)
    (left, right), (low, high) = _widened(min(xs), max(xs)), _widened(min(ys), max(ys))
    height = 160
    bottom = _TOP + 20 + height

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scale_x(x) - left) / (right - left)
        up = (scale_y(y) - low) / (high - low)
        return _LEFT + 6 + across * (WIDTH - _LEFT - _RIGHT - 12), bottom - up * height

    first_x, first_y = points[0]
    ticks = _log_ticks(low, high) if log_y else _ticks(low, high, 4)
    parts = _y_axis([(tick, at(first_x, tick)[1]) for tick in ticks], ylabel)
    ticks = _log_ticks(left, right) if log_x else _ticks(left, right, 4)
    for tick in ticks:
        parts.append(_text(at(tick, first_y)[0], bottom + 15, _number(tick), "middle"))
    for i, row in zip(numbers, series.values(), strict=True):
        positions = [at(*point) for point in row]
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in positions)
        parts.append(f'<path class="l{i}" d="{path}"/>')
        if len(positions) <= 40:
            parts += [_mark(i, x, y) for x, y in positions]
    parts.append(_text((_LEFT + WIDTH) / 2, bottom + 33, xlabel, "middle muted"))
    is_clear = len(series) == 1 and 0 in numbers
    keys = {} if is_clear else {name: key(i) for i, name in zip(numbers, series, strict=True)}
    return _chart(title, description, parts, bottom + 40, keys)


def intervals(
    title: str,
    description: str,
    rows: Mapping[str, tuple[float, float, float]],
    *,
    xlabel: str,
    series: Sequence[int],
    with_zero: bool = False,
) -> str:
    """Returns a mark on a line from one end of an interval to the other, a row for each name.

    Args:
      title: Title of the chart.
      description: Description for screen readers.
      rows: By name, the value and its interval: (value, low, high). Names are short.
      xlabel: Label of the axis.
      series: Of each row, the number of the series that gives its colour and mark.
      with_zero: Whether the axis contains 0, where there is a line then.
    """
    ends = [end for row in rows.values() for end in row] + [0.0] * with_zero
    low, high = _widened(min(ends), max(ends))
    bottom = _TOP + 24 * len(rows)

    def at(x: float) -> float:
        return _NAMES + 8 + (x - low) / (high - low) * (WIDTH - _NAMES - 16)

    parts = []
    for tick in _ticks(low, high, 4):
        kind = "zero" if with_zero and not tick else "grid"
        parts.append(f'<path class="{kind}" d="M{at(tick):.1f} {_TOP} V{bottom}"/>')
        parts.append(_text(at(tick), bottom + 15, _number(tick), "middle"))
    for (name, (value, start, end)), i, y in zip(
        rows.items(), series, range(_TOP + 12, bottom, 24), strict=True
    ):
        parts.append(_text(0, y + 4, name))
        parts.append(f'<path class="i{i}" d="M{at(start):.1f} {y} H{at(end):.1f}"/>')
        parts.append(
            f"<g>{_mark(i, at(value), y)}<title>{html.escape(name)}: {value:.2f} "
            f"[{start:.2f}, {end:.2f}]</title></g>"
        )
    parts.append(_text((_NAMES + WIDTH) / 2, bottom + 33, xlabel, "middle muted"))
    return _chart(title, description, parts, bottom + 40, {})


def key(series: int) -> str:
    """Returns the line and the mark of a series, to be shown beside its name."""
    return _small(f'<path class="l{series}" d="M0 6.5 L26 6.5"/>{_mark(series, 13, 6.5)}')


def _check(title: str, series: Mapping[str, object], most: int = MAX_SERIES) -> None:
    if len(series) > most:
        raise ValueError(f"{title}: expected at most {most} series, found {len(series)}")


def _chart(
    title: str, description: str, parts: Sequence[str], height: float, keys: Mapping[str, str]
) -> str:
    """Returns a figure: caption, legend if there are keys, and the chart.

    Args:
      title, description: Of the chart.
      parts: Its shapes and texts.
      height: Its height.
      keys: By name of each series, the key that stands before the name in the legend.
    """
    number = next(_ids)
    legend = ""
    if keys:
        items = "".join(f"<li>{key}{html.escape(name)}</li>" for name, key in keys.items())
        legend = f'<ul class="legend">{items}</ul>'
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{legend}"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-labelledby="t{number} d{number}"><title id="t{number}">{html.escape(title)}</title>'
        f'<desc id="d{number}">{html.escape(description)}</desc>{"".join(parts)}</svg></figure>'
    )


def patterns() -> str:
    """Returns the fill patterns that the style sheet refers to; needed once per page."""
    shapes = (
        '<path class="p1" d="M0 6 L6 0 M-1 1 L1 -1 M5 7 L7 5"/>',
        '<circle class="p2" cx="3" cy="3" r="1.6"/>',
    )
    defs = "".join(
        f'<pattern id="pattern{i}" width="6" height="6" patternUnits="userSpaceOnUse">{shape}'
        "</pattern>"
        for i, shape in enumerate(shapes, start=1)
    )
    return (
        f'<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>{defs}</defs></svg>'
    )


def _bar_keys(series: Collection[str]) -> dict[str, str]:
    if len(series) == 1:
        return {}
    shape = '<rect class="s{}" x="1" y="1" width="24" height="11"/>'
    return {name: _small(shape.format(i)) for i, name in enumerate(series)}


def _small(shapes: str) -> str:
    return f'<svg class="key" viewBox="0 0 26 13" aria-hidden="true">{shapes}</svg>'


def _mark(series: int, x: float, y: float) -> str:
    name = f'class="m{series}"'
    match _MARKS[series]:
        case "circle":
            return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
        case "square":
            return f'<rect {name} x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
        case "triangle":
            return f'<path {name} d="M{x:.1f} {y - 4:.1f} l4 7 h-8 z"/>'
        case "diamond":
            return f'<path {name} d="M{x:.1f} {y - 4.5:.1f} l4.5 4.5 l-4.5 4.5 l-4.5 -4.5 z"/>'
        case "inverted triangle":
            return f'<path {name} d="M{x:.1f} {y + 4:.1f} l4 -7 h-8 z"/>'
        case _:
            return (
                f'<path {name} d="M{x - 1.2:.1f} {y - 4:.1f} h2.4 v2.8 h2.8 v2.4 h-2.8 v2.8 h-2.4 '
                f'v-2.8 h-2.8 v-2.4 h2.8 z"/>'
            )


def _y_axis(ticks: Sequence[tuple[float, float]], label: str) -> list[str]:
    """Returns the label of the axis, and for each tick, its value and height, a line and a text."""
    parts = [_text(0, _TOP + 4, label, "muted")]
    for tick, y in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f} H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 5, y + 4, _number(tick), "end"))
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _top(values) -> float:
    """Returns a round number at least as large as all values."""
    largest = max(values, default=0.0)
    if largest <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(largest))
    return next(
        step * n for n in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * n >= largest * (1 - 1e-9)
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Returns round numbers from low to high: about `count` of them, or up to twice as many."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * n for n in (10, 5, 2.5, 2, 1) if size * n <= raw * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers from 10^low to 10^high, few enough for their texts not to overlap."""
    powers = [10.0**n for n in range(math.floor(low), math.ceil(high) + 1)]
    for steps in ((1, 2, 5), (1,)):
        ticks = [x * n for x in powers for n in steps if low <= math.log10(x * n) <= high]
        if len(ticks) <= 7:
            break
    return ticks if len(ticks) > 1 else _ticks(10.0**low, 10.0**high, 4)


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if value < 10**6 else f"{value / 10**6:.3g}M"
    return f"{value:.4g}"
