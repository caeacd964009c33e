"""Charts as inline SVG: no colour is set here, only classes that the page's style knows, in light and dark.

Lines differ in dash and marker besides colour and bear their names at their ends. Every point tells its numbers when
pointed at; who cannot see the chart hears its label, and finds the numbers in a table.
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

WIDTH, HEIGHT = 340, 240  # about as wide as a phone, so that letters are as large there as they are beside
LEFT, TOP, BOTTOM = 44, 26, 40
LETTER = 6.7  # widths of letters of the size that charts have, a little generous
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
"""Classes of lines that are compared; all others are references."""
HEAT_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
"""Where shades of a heat map begin, but for the two lightest: nothing at all, and anything above it."""


def percent(value: float) -> str:
    """Write a share as a tick of an axis."""
    return f"{100 * value:g}%"


def number(value: float) -> str:
    """Write a number as a tick of an axis."""
    return f"{value:,.10g}"


@dataclass(frozen=True)
class Axis:
    """An axis: its name, its ends, where it is marked, and how marks are written."""

    name: str
    low: float
    high: float
    ticks: tuple[float, ...]
    words: Callable[[float], str] = number


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: What stands at its end.
        points: ``(x, y)``, x ascending.
        style: Its class: one of `SERIES`, or a reference's.
        told: What each point says when pointed at.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    told: tuple[str, ...]


def axis(
    name: str,
    values: Iterable[float],
    *,
    words: Callable[[float], str] = number,
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
) -> Axis:
    """Fit an axis to values, with ticks at round numbers.

    Args:
        name: What it shows, with its unit.
        values: What it must hold.
        words: How ticks are written.
        low: Where it begins, if not at the least value's tick.
        high: Where it ends, if not at the greatest value's tick.
        whole: Whether only whole numbers mean anything.
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
    return Axis(name, ticks[0] if low is None else low, ticks[-1] if high is None else high, ticks, words)


def line_chart(
    label: str, x: Axis, y: Axis, lines: Sequence[Line], *, marks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Draw lines.

    Args:
        label: What the chart shows, for who cannot see it.
        x: To the right.
        y: Upwards.
        lines: Each bears its name; styles tell the first four apart besides.
        marks: Places on the x axis to mark by an upright line, and their names.
    """
    right = WIDTH - min(130.0, LETTER * max((len(line.name) for line in lines), default=0) + 16)
    bottom = HEIGHT - BOTTOM
    svg = _svg(label, WIDTH, HEIGHT)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x.low) / (x.high - x.low)
        up = (point[1] - y.low) / (y.high - y.low)
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    _frame(svg, x, y, (LEFT, right, TOP, bottom))
    for place, words in marks:
        if x.low <= place <= x.high:
            across, _ = at((place, y.low))
            _add(svg, "line", class_="mark", x1=across, x2=across, y1=TOP, y2=bottom)
            near_end = across + LETTER * len(words) > right
            anchor = "end" if near_end else "start"
            _add(svg, "text", words, class_="soft", x=across + (-4 if near_end else 4), y=TOP + 9, text_anchor=anchor)
    ends = []
    for line in lines:
        places = [at(point) for point in line.points]
        group = _add(svg, "g", class_=f"line {line.style}")
        if len(places) > 1:
            _add(group, "polyline", points=" ".join(f"{_n(a)},{_n(b)}" for a, b in places))
        for (across, up), told in zip(places, line.told, strict=True):
            marker = MARKERS.get(line.style, PLAIN_MARKER)
            point = _add(group, "path", d=marker, transform=f"translate({_n(across)} {_n(up)})")
            _add(point, "title", f"{line.name}, {told}")
        if places:
            ends.append((places[-1], line))
    heights = _apart([up for (_, up), _ in ends], TOP, bottom)
    for ((across, up), line), height in zip(ends, heights, strict=True):
        if abs(height - up) > LINE_HEIGHT / 2 or right - across > LINE_HEIGHT:
            _add(svg, "line", class_=f"leader {line.style}", x1=across + 4, y1=up, x2=right + 6, y2=height)
        _add(svg, "text", line.name, class_=f"name {line.style}", x=right + 8, y=height + 4)
    return _markup(svg)


def reliability_chart(label: str, bins: Sequence[ReliabilityBin], style: str) -> Markup:
    """Draw how often labels came against how probable they were said to be, and below it how many labels there were.

    Args:
        label: What the chart shows, for who cannot see it.
        bins: Bins of the calibration error.
        style: A class of `SERIES`.
    """
    svg, right, bottom = _svg(label, WIDTH, HEIGHT + 40), WIDTH - 18, HEIGHT - BOTTOM - 18
    x = axis("", (), low=0, high=1, words=percent)
    y = axis("share chosen", (), low=0, high=1, words=percent)
    _frame(svg, x, y, (LEFT, right, TOP, bottom))

    def at(probability: float, share: float) -> tuple[float, float]:
        return LEFT + probability * (right - LEFT), bottom - share * (bottom - TOP)

    (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
    _add(svg, "line", class_="mark", x1=x1, y1=y1, x2=x2, y2=y2)
    filled = [one for one in bins if one.labels]
    places = [at(one.mean_probability or 0.0, one.chosen_share or 0.0) for one in filled]
    group = _add(svg, "g", class_=f"line {style}")
    _add(group, "polyline", points=" ".join(f"{_n(a)},{_n(b)}" for a, b in places))
    # The least probable bin holds nearly all labels: only the logarithm of the counts can be seen.
    floor, most = HEIGHT + 6, max((one.labels for one in filled), default=1)
    for one, (across, up) in zip(filled, places, strict=True):
        told = (
            f"said {one.mean_probability:.1%}, chosen {one.chosen_share:.1%}, {one.labels:,} labels "
            f"from {one.low:.0%} to {one.high:.0%}"
        )
        point = _add(group, "path", d=MARKERS[style], transform=f"translate({_n(across)} {_n(up)})")
        _add(point, "title", told)
        tall = 4 + 30 * math.log10(one.labels) / max(1.0, math.log10(most))
        begins, ends = (LEFT + end * (right - LEFT) for end in (one.low, one.high))
        bar = _add(svg, "rect", class_="bar", x=begins + 1, y=floor - tall, width=ends - begins - 2, height=tall)
        _add(bar, "title", told)
    _add(svg, "text", "labels", class_="soft", x=LEFT - 6, y=floor - 12, text_anchor="end")
    _add(svg, "text", f"{_short(most)}", class_="soft", x=LEFT - 6, y=floor, text_anchor="end")
    _add(svg, "text", "probability said", class_="soft", x=(LEFT + right) / 2, y=floor + 20, text_anchor="middle")
    return _markup(svg)


def heat_map(label: str, values: npt.NDArray[np.float64], rows: Sequence[int]) -> Markup:
    """Draw a matrix as shades.

    Args:
        label: What the chart shows, for who cannot see it.
        values: ``(rows, columns)``, from 0; shades begin at `HEAT_EDGES`.
        rows: What the rows are called.
    """
    down, across = values.shape
    cell = float(np.clip(720 // across, 6, 28))
    tall = min(cell, 16.0)
    left = 30
    svg = _svg(label, left + across * cell + 4, 16 + down * tall + 36)
    shades = np.where(values > 0, 1 + np.searchsorted(HEAT_EDGES, values, side="right"), 0)
    for shade in range(len(HEAT_EDGES) + 2):
        cells = np.argwhere(shades == shade)
        shape = f"h{_n(cell - 1)}v{_n(tall - 1)}h{_n(1 - cell)}z"
        if len(cells):
            path = "".join(f"M{_n(left + column * cell)} {_n(16 + row * tall)}{shape}" for row, column in cells)
            _add(svg, "path", class_=f"q{shade}", d=path)
    for row in range(0, down, -(-down // 26)):
        _add(svg, "text", str(rows[row]), class_="soft", x=left - 5, y=12 + (row + 1) * tall, text_anchor="end")
    every = 8 if across > 16 else 1
    foot = 16 + down * tall + 13
    for column in range(0, across, every):
        middle = left + (column + 0.5) * cell
        _add(svg, "text", str(column), class_="soft", x=middle, y=foot, text_anchor="middle")
    _add(svg, "text", "expert", class_="soft", x=left, y=foot + 16)
    _add(svg, "text", "layer", class_="soft", x=0, y=9)
    return _markup(svg)


def swatch(style: str) -> Markup:
    """Draw a sample of a shade."""
    svg = ElementTree.Element("svg", {"class": "swatch", "viewBox": "0 0 12 12", "aria-hidden": "true"})
    _add(svg, "rect", class_=style, width=12, height=12)
    return _markup(svg)


def _frame(svg: Element, x: Axis, y: Axis, box: tuple[float, float, float, float]) -> None:
    """Draw axes and grid in ``(left, right, top, bottom)``."""
    left, right, top, bottom = box
    for tick in y.ticks:
        up = bottom - (tick - y.low) / (y.high - y.low) * (bottom - top)
        _add(svg, "line", class_="grid", x1=left, x2=right, y1=up, y2=up)
        _add(svg, "text", y.words(tick), class_="soft", x=left - 6, y=up + 4, text_anchor="end")
    for tick in x.ticks:
        across = left + (tick - x.low) / (x.high - x.low) * (right - left)
        _add(svg, "line", class_="axis", x1=across, x2=across, y1=bottom, y2=bottom + 4)
        _add(svg, "text", x.words(tick), class_="soft", x=across, y=bottom + 17, text_anchor="middle")
    _add(svg, "line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom)
    _add(svg, "text", y.name, class_="soft", x=2, y=11)
    _add(svg, "text", x.name, class_="soft", x=(left + right) / 2, y=bottom + 34, text_anchor="middle")


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Move heights apart until each has room for a line of text, within top and bottom, in their order."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [heights[index] for index in order]
    for n in range(1, len(placed)):
        placed[n] = max(placed[n], placed[n - 1] + LINE_HEIGHT)
    limit = bottom
    for n in reversed(range(len(placed))):
        placed[n] = max(min(placed[n], limit), top)
        limit = placed[n] - LINE_HEIGHT
    found = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        found[index] = height
    return found


def _short(count: int) -> str:
    """Write a count in few letters."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _svg(label: str, width: float, height: float) -> Element:
    return Element(
        "svg", {"viewBox": f"0 0 {_n(width)} {_n(height)}", "width": _n(width), "role": "img", "aria-label": label}
    )


def _add(parent: Element, tag: str, text: str | None = None, /, **attributes: str | float) -> Element:
    """Add an element; a trailing underscore of an attribute's name is dropped, others become hyphens."""
    named = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else _n(value)
        for name, value in attributes.items()
    }
    found = SubElement(parent, tag, named)
    found.text = text
    return found


def _n(value: float) -> str:
    """Write a coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def _markup(svg: Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))  # ElementTree has escaped all text
