"""Plots of replay results."""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from moe_beyond.files import replacing
from moe_beyond.geometry import Geometry
from moe_beyond.report.labels import BASELINES, BYTES_AXIS, strategy_label
from moe_beyond.simulator import Result
from moe_beyond.simulator.timeline import Timeline

DPI = 120
MOST_COLORS = 256
"""Colours of a PNG file without heat maps; a palette more than halves its size."""

MOST_TICKS = 26


class NotebookFigure(Figure):
    """A figure that notebooks display, with or without ``%matplotlib inline``."""

    def _repr_png_(self) -> bytes:
        return render_png(self)


def render_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    numbers = [
        text for axis in axes for text in (*axis.get_ticklabels(), *axis.get_ticklabels(True), axis.get_offset_text())
    ]
    for text in set(figure.findobj(Text)) - set(numbers):
        text.set_parse_math(False)  # a name may contain $
    drawn, compressed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    image = Image.open(drawn).convert("RGB")
    if not any(axes.get_images() for axes in figure.axes):
        image = image.quantize(MOST_COLORS, dither=Image.Dither.NONE)
    image.save(compressed, format="png", optimize=True)
    return compressed.getvalue()


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(render_png(figure))


def line_styles(strategies: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the line style of each strategy: black and grey for baselines, colours for up to ten others."""
    colors = itertools.cycle(matplotlib.color_sequences["tab10"])
    for strategy in strategies:
        if strategy in BASELINES:
            yield dict(BASELINES[strategy].line)
        else:
            yield {"color": matplotlib.colors.to_hex(next(colors)), "linestyle": "-"}


def budgets_plot(results: Sequence[Result], title: str) -> Figure:
    """Draw hit rate, bytes and, on a device, tokens per second over budgets, one line per strategy.

    Args:
        results: Results of several budgets.
        title: Title of the figure, such as the name of the traces.
    """
    timed = any(result.tokens_per_second for result in results)
    figure = NotebookFigure(figsize=(15 if timed else 10, 5.4), layout="constrained")
    panels = figure.subplots(1, 3 if timed else 2)
    hit_rates, bytes_ratios = panels[0], panels[1]
    by_label = _by_label(results)
    for (label, line), style in zip(by_label.items(), _styles(by_label), strict=True):
        shares = [100 * result.budget_share for result in line]
        marks = {"marker": "o", "markersize": 3, **style}
        hit_rates.plot(shares, [100 * result.hit_rate for result in line], label=label, **marks)
        bytes_ratios.plot(shares, [result.bytes_ratio for result in line], **marks)
        if timed:
            speeds = [np.nan if r.tokens_per_second is None else r.tokens_per_second for r in line]
            panels[2].plot(shares, speeds, **marks)
    one_token = 100 * results[0].budget_share / results[0].demand_ratio
    largest = max(100 * result.budget_share for line in by_label.values() for result in line)
    for axes in panels:
        axes.axvline(one_token, color="0.75", linewidth=1, zorder=0)
        axes.set_xlabel("cache size (% of all experts)")
        axes.set_xlim(0, 1.02 * largest)
        axes.grid(alpha=0.3)
    hit_rates.annotate(
        "experts of\none token", (one_token, 3), xytext=(4, 0), textcoords="offset points", color="0.4", size=9
    )
    hit_rates.set_title("Hit rate: higher is better", size=11)
    hit_rates.set_ylabel("hit rate (%)")
    hit_rates.set_ylim(0, 101)
    bytes_ratios.set_title("Bytes: lower is better", size=11)
    bytes_ratios.set_ylabel(BYTES_AXIS)
    bytes_ratios.set_ylim(bottom=0)
    if timed:
        _draw_resident_speed(panels[2], results)
        panels[2].set_title("Speed by the timing model: higher is better", size=11)
        panels[2].set_ylabel("tokens per second")
        panels[2].set_ylim(bottom=0)
    _add_legend(figure, hit_rates)
    figure.suptitle(title)
    return figure


def frontier_plot(results: Sequence[Result], title: str) -> Figure:
    """Draw hit rate over bytes, one line per strategy through its budgets; up and to the left is better.

    Args:
        results: Results of one or several budgets.
        title: Title of the figure, such as the name of the traces.
    """
    figure = NotebookFigure(figsize=(8, 6.4), layout="constrained")
    axes = figure.subplots()
    by_label = _by_label(results)
    for (label, line), style in zip(by_label.items(), _styles(by_label), strict=True):
        bytes_ratios = [result.bytes_ratio for result in line]
        axes.plot(bytes_ratios, [100 * r.hit_rate for r in line], marker="o", markersize=4, label=label, **style)
    shares = [100 * result.budget_share for line in by_label.values() for result in line]
    budgets = f"{min(shares):.0f} % (right end) to {max(shares):.0f} % (left end)"
    budgets = budgets if min(shares) < max(shares) else f"{shares[0]:.0f} %"
    axes.set_title(f"Up and to the left is better; cache size {budgets} of all experts", size=9, color="0.35")
    axes.set_xlabel(BYTES_AXIS)
    axes.set_ylabel("hit rate (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    _add_legend(figure, axes)
    figure.suptitle(title)
    return figure


def layers_plot(results: Sequence[Result], geometry: Geometry, title: str) -> Figure:
    """Draw the hit rate of each strategy and layer at the smallest budget, as a heat map.

    Args:
        results: Results of one or several budgets.
        geometry: Geometry of the model.
        title: Title of the figure, such as the name of the traces.
    """
    rows = {label: line[0] for label, line in _by_label(results).items()}
    smallest = min(result.budget_slots for result in rows.values())
    rows = {label: result for label, result in rows.items() if result.budget_slots == smallest}
    rates = np.array([[100 * layer["hit_rate"] for layer in result.per_layer] for result in rows.values()])
    figure = NotebookFigure(figsize=(11, 1.6 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rates, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    step = -(-geometry.num_layers // MOST_TICKS)
    axes.set_xticks(range(0, geometry.num_layers, step), [str(n) for n in geometry.moe_layers[::step]], fontsize=8)
    axes.set_xlabel("model layer")
    figure.colorbar(image, ax=axes, label="hit rate (%)")
    figure.suptitle(f"{title}: {smallest:,} slots")
    return figure


def timeline_plot(timeline: Timeline, geometry: Geometry, title: str) -> Figure:
    """Draw the timeline of one token: computing and stalls of each layer, and transfers.

    Args:
        timeline: Timeline of the token.
        geometry: Geometry of the model.
        title: Title of the figure.
    """
    figure = NotebookFigure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots()
    start = timeline.begins
    parts = {
        "compute": ("tab:green", 0, timeline.computing),
        "stall": ("tab:red", 0, timeline.stalls),
        "demand transfer": ("tab:orange", 1, timeline.demand_transfers),
        "prefetch": ("tab:blue", 1, timeline.prefetch_transfers),
    }
    for name, (color, row, spans) in parts.items():
        bars = [(1e3 * (begin - start), 1e3 * (end - begin)) for begin, end in spans]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.3, label=name)
    for layer, begin in enumerate(timeline.layers):
        if layer % -(-geometry.num_layers // MOST_TICKS) == 0:
            axes.annotate(
                str(geometry.moe_layers[layer]),
                (1e3 * (begin - start), 0.42),
                size=6,
                color="0.4",
                annotation_clip=True,
            )
    axes.set_yticks([0, 1], ["GPU", "interconnect"])
    axes.set_xlim(0, 1e3 * (timeline.ends - start))
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel("milliseconds since the start of the token (small numbers: model layers)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, fontsize=8)
    figure.suptitle(title)
    return figure


def _by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group results by legend, in ascending order of budgets; ``all_resident`` has no budget and is left out."""
    by_label: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        if result.policy != "all_resident":
            by_label.setdefault(strategy_label(result), []).append(result)
    return by_label


def _styles(by_label: dict[str, list[Result]]) -> Iterator[dict[str, Any]]:
    return line_styles(line[0].strategy for line in by_label.values())


def _draw_resident_speed(axes: Axes, results: Sequence[Result]) -> None:
    """Mark the speed with all experts resident; as text if a line would compress all others."""
    resident = next((result.tokens_per_second for result in results if result.policy == "all_resident"), None)
    if not resident:
        return
    text = f"all experts resident: {resident:,.1f}"
    if resident > 2 * axes.get_ylim()[1]:
        axes.text(0.02, 0.96, text, transform=axes.transAxes, va="top", color="0.4", size=9)
    else:
        axes.axhline(resident, color="0.5", linestyle=":", linewidth=1)
        axes.annotate(text, (0.02, resident), xycoords=("axes fraction", "data"), va="bottom", color="0.4", size=9)


def _add_legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
