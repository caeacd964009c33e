"""Pictures of replay results."""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_beyond.files import replacing
from moe_beyond.geometry import Geometry
from moe_beyond.report.tables.results import scores_words
from moe_beyond.simulator import Result
from moe_beyond.simulator.timeline import Timeline

OPTIMUM = "belady"
DPI = 120
# What every strategy is compared with is black or grey; the colours are for the others.
REFERENCE_STYLES: dict[str, dict[str, Any]] = {
    "lru": {"color": "black", "linestyle": "-"},
    "belady": {"color": "black", "linestyle": "--"},
    "static_hindsight": {"color": "0.6", "linestyle": "-"},
    "clairvoyant prefetch": {"color": "0.6", "linestyle": "--"},
}


def line_name(result: Result) -> str:
    """Name a strategy in a legend."""
    if result.policy == OPTIMUM and result.prefetch == "none":
        return f"{result.strategy} (optimum without prefetch)"
    if result.predictor is None:
        return result.strategy
    return f"{result.strategy}, {result.predictor}, lookahead {scores_words(result)}"


def lines_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Gather the results of each strategy by ascending budget; without what has no budget."""
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        if result.policy != "all_resident":
            lines.setdefault(line_name(result), []).append(result)
    return lines


def line_styles(lines: dict[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """Return how to draw each line; no two alike, up to ten besides the references."""
    return dict(zip(lines, styles_of(line[0].strategy for line in lines.values()), strict=True))


def styles_of(strategies: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield how to draw each strategy."""
    colours = itertools.cycle(matplotlib.color_sequences["tab10"])
    for strategy in strategies:
        reference = REFERENCE_STYLES.get(strategy)
        yield reference or {"color": matplotlib.colors.to_hex(next(colours)), "linestyle": "-"}


def budgets_figure(results: Sequence[Result], title: str) -> Figure:
    """Draw hit rate and bytes, and on a device tokens a second, against the budget, a line a strategy.

    Args:
        results: Of several budgets.
        title: What the traces are.
    """
    timed = any(result.tokens_per_second for result in results)
    figure = Picture(figsize=(15 if timed else 10, 5.0), layout="constrained")
    axes = figure.subplots(1, 3 if timed else 2)
    hits, bytes_moved = axes[0], axes[1]
    lines = lines_of(results)
    for (name, line), style in zip(lines.items(), line_styles(lines).values(), strict=True):
        shares = [100 * result.budget_share for result in line]
        hits.plot(shares, [100 * result.hit_rate for result in line], marker="o", markersize=3, label=name, **style)
        bytes_moved.plot(shares, [result.bytes_ratio for result in line], marker="o", markersize=3, **style)
        if timed:
            speeds = [np.nan if r.tokens_per_second is None else r.tokens_per_second for r in line]
            axes[2].plot(shares, speeds, marker="o", markersize=3, **style)
    one_token = 100 * results[0].budget_share / results[0].demand_ratio
    for part in axes:
        part.axvline(one_token, color="0.8", linewidth=1, zorder=0)
        part.set_xlabel("experts that fit (% of all)")
        part.set_xlim(0, 100)
        part.grid(alpha=0.3)
    hits.annotate(
        "one token's experts", (one_token, 95), xytext=(4, 0), textcoords="offset points", color="0.5", size=8
    )
    hits.set_ylabel("hit rate (%)")
    hits.set_ylim(0, 101)
    bytes_moved.set_ylabel("bytes moved / bytes demanded")
    bytes_moved.set_ylim(bottom=0)
    if timed:
        resident = [result.tokens_per_second for result in results if result.policy == "all_resident"]
        if resident and resident[0]:
            axes[2].axhline(resident[0], color="0.5", linestyle=":", linewidth=1)
            axes[2].annotate("all resident", (2, resident[0]), va="bottom", color="0.5", size=8)
        axes[2].set_ylabel("tokens a second")
        axes[2].set_ylim(bottom=0)
    _legend(figure, hits)
    figure.suptitle(title)
    return figure


def frontier_figure(results: Sequence[Result], title: str) -> Figure:
    """Draw hit rate against bytes, a line a strategy through its budgets: up and to the left is better.

    Args:
        results: Of one or several budgets.
        title: What the traces are.
    """
    figure = Picture(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    lines = lines_of(results)
    for (name, line), style in zip(lines.items(), line_styles(lines).values(), strict=True):
        bytes_moved = [result.bytes_ratio for result in line]
        axes.plot(bytes_moved, [100 * r.hit_rate for r in line], marker="o", markersize=4, label=name, **style)
    shares = [100 * result.budget_share for line in lines.values() for result in line]
    if min(shares) < max(shares):
        axes.set_title(f"from {min(shares):.0f} % (right) to {max(shares):.0f} % of all experts", size=9, color="0.4")
    axes.set_xlabel("bytes moved / bytes demanded")
    axes.set_ylabel("hit rate (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    figure.suptitle(title)
    return figure


def layers_figure(results: Sequence[Result], geometry: Geometry, title: str) -> Figure:
    """Draw each strategy's hit rate layer by layer as a heat map, of the smallest budget there is.

    Args:
        results: Of one or several budgets.
        geometry: The model.
        title: What the traces are.
    """
    rows = {name: line[0] for name, line in lines_of(results).items()}
    smallest = min(result.budget_slots for result in rows.values())
    rows = {name: result for name, result in rows.items() if result.budget_slots == smallest}
    rates = np.array([[100 * layer["hit_rate"] for layer in result.per_layer] for result in rows.values()])
    figure = Picture(figsize=(11, 1.6 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rates, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    every = -(-geometry.num_layers // 26)
    axes.set_xticks(range(0, geometry.num_layers, every), [str(n) for n in geometry.moe_layers[::every]], fontsize=8)
    axes.set_xlabel("model layer")
    figure.colorbar(image, ax=axes, label="hit rate (%)")
    figure.suptitle(f"{title}: {smallest} slots")
    return figure


def timeline_figure(timeline: Timeline, geometry: Geometry, title: str) -> Figure:
    """Draw one token: when each layer computed and stalled, and what was on the link meanwhile.

    Args:
        timeline: The token's.
        geometry: The model.
        title: What it is.
    """
    figure = Picture(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots()
    began = timeline.begins
    parts = {
        "compute": ("tab:green", 0, timeline.computing),
        "stall": ("tab:red", 0, timeline.stalls),
        "moved on demand": ("tab:orange", 1, timeline.demand_transfers),
        "moved ahead": ("tab:blue", 1, timeline.prefetch_transfers),
    }
    for name, (color, row, spans) in parts.items():
        bars = [(1e3 * (begin - began), 1e3 * (end - begin)) for begin, end in spans]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.3, label=name)
    for layer, (begin, _) in enumerate(timeline.computing[::2]):
        if layer % -(-geometry.num_layers // 26) == 0:
            axes.annotate(
                str(geometry.moe_layers[layer]),
                (1e3 * (begin - began), 0.42),
                size=6,
                color="0.4",
                annotation_clip=True,
            )
    axes.set_yticks([0, 1], ["GPU", "link"])
    axes.set_xlim(0, 1e3 * (timeline.ends - began))
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel("ms since the token started (numbers: model layers)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, fontsize=8)
    figure.suptitle(title)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


class Picture(Figure):
    """A figure that a notebook shows as one picture, with ``%matplotlib inline`` or without."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    return drawn.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(png(figure))
