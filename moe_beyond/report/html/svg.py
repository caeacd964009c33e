"""Charts as inline SVG with CSS classes; the page's style sheet sets the colours, in light and dark.

Lines differ in colour, dash and marker, and have their names at their ends. Every point has a tooltip with its numbers.
Screen readers read the chart's label; the same numbers are in a table of the page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from moe_beyond.metrics import ReliabilityBin
from moe_beyond.safe_text import printable, printable_lines

WIDTH, HEIGHT = 340, 240  # about the width of a phone, so that text is not scaled there
LEFT, TOP, BOTTOM = 44, 26, 40
LETTER = 6.7  # upper estimate of the mean width of a letter
LINE_HEIGHT = 13.0
MOST_TICKS = 6
MARKERS = {
    "s0": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s1": "M-2.7-2.7h5.4v5.4h-5.4z",
    "s2": "M0-3.8l3.8 3.8-3.8 3.8-3.8-3.8z",
    "s3": "M0-3.6l3.6 6.4h-7.2z",
}
PLAIN_MARKER = "M-1.6 0a1.6 1.6 0 1 0 3.2 0a1.6 1.6 0 1 0-3.2 0z"
SERIES = tuple(MARKERS)
"""CSS classes of compared strategies; baselines have classes of their own."""
HEAT_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
"""Lower bounds of the shades of a heat map; two lighter shades show 0, and values above 0."""


def format_percent(value: float) -> str:
    """Format a share as the label of a tick."""
    return f"{100 * value:g}%"


def format_number(value: float) -> str:
    """Format a number as the label of a tick."""
    return f"{value:,.10g}"


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        name: Name and unit.
        low: Value at the start.
        high: Value at the end.
        ticks: Values of the ticks.
        format_tick: Formats a tick's label.
    """

    name: str
    low: float
    high: float
    ticks: tuple[float, ...]
    format_tick: Callable[[float], str] = format_number


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: Text at the end of the line.
        points: ``(x, y)`` in drawing order.
        style: CSS class: one of `SERIES`, or the class of a baseline.
        tooltips: Tooltip of each point.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    tooltips: tuple[str, ...]


def fit_axis(
    name: str,
    values: Iterable[float],
    *,
    format_tick: Callable[[float], str] = format_number,
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
) -> Axis:
    """Return an axis that contains all values, with ticks at round numbers.

    Args:
        name: Name and unit.
        values: Values to contain; values that are not finite are ignored.
        format_tick: Formats a tick's label.
        low: Value at the start (default: the tick at or below the smallest value).
        high: Value at the end (default: the tick at or above the largest value).
        whole: Whether ticks must be whole numbers.
    """
    values = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    bottom, top = min(values) if low is None else low, max(values) if high is None else high
    if top <= bottom:
        low = high = None
        bottom, top = bottom - 1, bottom + 1
    step = 10.0 ** math.floor(math.log10(top - bottom))
    steps = (step / 10, step / 5, step / 4, step / 2, step, 2 * step)
    step = next(s for s in steps if (top - bottom) / s < MOST_TICKS - 1e-9 and not (whole and s % 1))
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    if low is not None:
        first = math.ceil(bottom / step - 1e-9)
    if high is not None:
        last = math.floor(top / step + 1e-9)
    ticks = tuple(round(n * step, 12) for n in range(first, last + 1))
    return Axis(name, ticks[0] if low is None else low, ticks[-1] if high is None else high, ticks, format_tick)


def line_chart(
    label: str, x: Axis, y: Axis, lines: Sequence[Line], *, marks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Draw a line chart.

    Args:
        label: Description for screen readers.
        x: Horizontal axis of the chart.
        y: Vertical axis of the chart.
        lines: Lines, each with its name at its end.
        marks: ``(x, text)`` of vertical lines.
    """
    right = WIDTH - min(130.0, LETTER * max((len(line.name) for line in lines), default=0) + 16)
    bottom = HEIGHT - BOTTOM
    svg = _svg(label, WIDTH, HEIGHT)

    def position(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x.low) / (x.high - x.low)
        up = (point[1] - y.low) / (y.high - y.low)
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    _frame(svg, x, y, (LEFT, right, TOP, bottom))
    for mark, text in marks:
        if x.low <= mark <= x.high:
            mark_x, _ = position((mark, y.low))
            _add(svg, "line", class_="mark", x1=mark_x, x2=mark_x, y1=TOP, y2=bottom)
            near_end = mark_x + LETTER * len(text) > right
            anchor = "end" if near_end else "start"
            _add(svg, "text", text, class_="soft", x=mark_x + (-4 if near_end else 4), y=TOP + 9, text_anchor=anchor)
    ends = []
    for line in lines:
        positions = [position(point) for point in line.points]
        group = _add(svg, "g", class_=f"line {line.style}")
        if len(positions) > 1:
            _add(group, "polyline", points=" ".join(f"{_n(x_)},{_n(y_)}" for x_, y_ in positions))
        for (point_x, point_y), tooltip in zip(positions, line.tooltips, strict=True):
            marker = MARKERS.get(line.style, PLAIN_MARKER)
            point = _add(group, "path", d=marker, transform=f"translate({_n(point_x)} {_n(point_y)})")
            _add(point, "title", f"{line.name}, {tooltip}")
        if positions:
            ends.append((positions[-1], line))
    label_heights = _spread([end_y for (_, end_y), _ in ends], TOP, bottom)
    for ((end_x, end_y), line), label_y in zip(ends, label_heights, strict=True):
        if abs(label_y - end_y) > LINE_HEIGHT / 2 or right - end_x > LINE_HEIGHT:
            _add(svg, "line", class_=f"leader {line.style}", x1=end_x + 4, y1=end_y, x2=right + 6, y2=label_y)
        _add(svg, "text", line.name, class_=f"name {line.style}", x=right + 8, y=label_y + 4)
    return _markup(svg)


def reliability_chart(label: str, bins: Sequence[ReliabilityBin], style: str) -> Markup:
    """Draw observed frequency over predicted probability, and the number of labels in each bin below.

    Args:
        label: Description for screen readers.
        bins: Bins of the calibration error.
        style: CSS class, one of `SERIES`.
    """
    svg, right, bottom = _svg(label, WIDTH, HEIGHT + 40), WIDTH - 18, HEIGHT - BOTTOM - 18
    x = fit_axis("", (), low=0, high=1, format_tick=format_percent)
    y = fit_axis("observed frequency", (), low=0, high=1, format_tick=format_percent)
    _frame(svg, x, y, (LEFT, right, TOP, bottom))

    def position(probability: float, share: float) -> tuple[float, float]:
        return LEFT + probability * (right - LEFT), bottom - share * (bottom - TOP)

    (x1, y1), (x2, y2) = position(0, 0), position(1, 1)
    _add(svg, "line", class_="mark", x1=x1, y1=y1, x2=x2, y2=y2)
    filled = [row for row in bins if row.labels]
    positions = [position(row.mean_probability or 0.0, row.selected_share or 0.0) for row in filled]
    group = _add(svg, "g", class_=f"line {style}")
    _add(group, "polyline", points=" ".join(f"{_n(point_x)},{_n(point_y)}" for point_x, point_y in positions))
    # The lowest bin holds nearly all labels: a linear scale would hide the other bars.
    base, most = HEIGHT + 6, max((row.labels for row in filled), default=1)
    for row, (point_x, point_y) in zip(filled, positions, strict=True):
        tooltip = (
            f"predicted {row.mean_probability:.1%}, observed {row.selected_share:.1%}, {row.labels:,} labels "
            f"from {row.low:.0%} to {row.high:.0%}"
        )
        point = _add(group, "path", d=MARKERS[style], transform=f"translate({_n(point_x)} {_n(point_y)})")
        _add(point, "title", tooltip)
        height = 4 + 30 * math.log10(row.labels) / max(1.0, math.log10(most))
        start, end = (LEFT + edge * (right - LEFT) for edge in (row.low, row.high))
        bar = _add(svg, "rect", class_="bar", x=start + 1, y=base - height, width=end - start - 2, height=height)
        _add(bar, "title", tooltip)
    _add(svg, "text", "labels", class_="soft", x=LEFT - 6, y=base - 12, text_anchor="end")
    _add(svg, "text", f"{_abbreviate(most)}", class_="soft", x=LEFT - 6, y=base, text_anchor="end")
    middle = (LEFT + right) / 2
    _add(svg, "text", "predicted probability", class_="soft", x=middle, y=base + 20, text_anchor="middle")
    return _markup(svg)


def heat_map(label: str, values: npt.NDArray[np.float64], rows: Sequence[int]) -> Markup:
    """Draw a matrix of layers and experts as shades.

    Args:
        label: Description for screen readers.
        values: Values from 0, ``(rows, columns)``; shades begin at `HEAT_EDGES`.
        rows: Labels of the rows.
    """
    row_count, column_count = values.shape
    width = float(np.clip(720 // column_count, 6, 28))
    height = min(width, 16.0)
    left = 30
    svg = _svg(label, left + column_count * width + 4, 16 + row_count * height + 36)
    shades = np.where(values > 0, 1 + np.searchsorted(HEAT_EDGES, values, side="right"), 0)
    for shade in range(len(HEAT_EDGES) + 2):
        cells = np.argwhere(shades == shade)
        shape = f"h{_n(width - 1)}v{_n(height - 1)}h{_n(1 - width)}z"
        if len(cells):
            path = "".join(f"M{_n(left + column * width)} {_n(16 + row * height)}{shape}" for row, column in cells)
            _add(svg, "path", class_=f"q{shade}", d=path)
    for row in range(0, row_count, math.ceil(LINE_HEIGHT / height)):
        _add(svg, "text", str(rows[row]), class_="soft", x=left - 5, y=20 + (row + 0.5) * height, text_anchor="end")
    step = 8 if column_count > 16 else 1
    foot = 16 + row_count * height + 13
    for column in range(0, column_count, step):
        middle = left + (column + 0.5) * width
        _add(svg, "text", str(column), class_="soft", x=middle, y=foot, text_anchor="middle")
    _add(svg, "text", "expert", class_="soft", x=left, y=foot + 16)
    _add(svg, "text", "layer", class_="soft", x=0, y=9)
    return _markup(svg)


def shade_sample(style: str) -> Markup:
    """Draw a square in a shade's CSS class, for a legend."""
    svg = ElementTree.Element("svg", {"class": "swatch", "viewBox": "0 0 12 12", "aria-hidden": "true"})
    _add(svg, "rect", class_=style, width=12, height=12)
    return _markup(svg)


def _frame(svg: Element, x: Axis, y: Axis, box: tuple[float, float, float, float]) -> None:
    """Draw axes and grid in ``(left, right, top, bottom)``."""
    left, right, top, bottom = box
    for tick in y.ticks:
        tick_y = bottom - (tick - y.low) / (y.high - y.low) * (bottom - top)
        _add(svg, "line", class_="grid", x1=left, x2=right, y1=tick_y, y2=tick_y)
        _add(svg, "text", y.format_tick(tick), class_="soft", x=left - 6, y=tick_y + 4, text_anchor="end")
    for tick in x.ticks:
        tick_x = left + (tick - x.low) / (x.high - x.low) * (right - left)
        _add(svg, "line", class_="axis", x1=tick_x, x2=tick_x, y1=bottom, y2=bottom + 4)
        _add(svg, "text", x.format_tick(tick), class_="soft", x=tick_x, y=bottom + 17, text_anchor="middle")
    _add(svg, "line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom)
    _add(svg, "text", y.name, class_="soft", x=2, y=11)
    _add(svg, "text", x.name, class_="soft", x=(left + right) / 2, y=bottom + 34, text_anchor="middle")


def _spread(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Move text lines apart until none overlap, between top and bottom and without changing their order."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = [heights[index] for index in order]
    for n in range(1, len(moved)):
        moved[n] = max(moved[n], moved[n - 1] + LINE_HEIGHT)
    limit = bottom
    for n in reversed(range(len(moved))):
        moved[n] = max(min(moved[n], limit), top)
        limit = moved[n] - LINE_HEIGHT
    result = [0.0] * len(heights)
    for index, height in zip(order, moved, strict=True):
        result[index] = height
    return result


def _abbreviate(count: int) -> str:
    """Format a count with a unit: ``657k``."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _svg(label: str, width: float, height: float) -> Element:
    box, name = f"0 0 {_n(width)} {_n(height)}", printable(label)
    return Element("svg", {"viewBox": box, "width": _n(width), "role": "img", "aria-label": name})


def _add(parent: Element, tag: str, text: str | None = None, /, **attributes: str | float) -> Element:
    """Add an element; in attribute names a trailing underscore is dropped and other underscores become hyphens."""
    named = {
        name.rstrip("_").replace("_", "-"): printable(value) if isinstance(value, str) else _n(value)
        for name, value in attributes.items()
    }
    element = SubElement(parent, tag, named)
    element.text = text and printable_lines(text)
    return element


def _n(value: float) -> str:
    """Format a coordinate to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def _markup(svg: Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))  # nosec B704 # ElementTree has escaped all text
