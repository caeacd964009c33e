"""Plots of a trace set, as ``moe-beyond inspect --plots`` writes them."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_beyond.traces.analysis.summary import Contrast, LayerContrast, LayerSummary, TraceSummary

Layers = tuple[LayerSummary, ...] | tuple[LayerContrast, ...]

MOST_TICKS = 26
CHANCE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
"""Line style of values by chance and of bounds."""

SHADES_END = 99.5
"""Percentile of popularity at which the heat map's colours end; one very popular expert would darken all others."""


def inspection_plots(summary: TraceSummary, contrast: Contrast | None = None) -> dict[str, Figure]:
    """Draw the plots of a trace set.

    Args:
        summary: Result of `moe_beyond.traces.analysis.statistics.summarize`.
        contrast: Result of `moe_beyond.traces.analysis.contrast.contrast_traces` (default: no figure of it).

    Returns:
        Name -> figure: ``popularity``, ``locality`` and ``reuse_distance``; ``dependence`` for more than one layer;
        ``phases`` if sequences have both phases; ``contrast`` if it is given.
    """
    title = f"{summary.geometry.model}, {summary.source}"
    plots = {
        "popularity": popularity_plot(summary, title),
        "locality": locality_plot(summary, title),
        "reuse_distance": reuse_distance_plot(summary, title),
    }
    if len(summary.by_layer) > 1:
        plots["dependence"] = dependence_plot(summary, title)
    if summary.phases:
        plots["phases"] = phases_plot(summary, title)
    if contrast is not None:
        plots["contrast"] = contrast_plot(contrast, title)
    return plots


def popularity_plot(summary: TraceSummary, title: str) -> Figure:
    """Draw the popularity of each expert and layer as a heat map."""
    layers = summary.by_layer
    ratios = np.array([row.popularity for row in layers]) * summary.geometry.num_experts
    figure, axes = _expert_axes(layers, title)
    image = axes.imshow(
        ratios,
        aspect="auto",
        interpolation="none",
        vmin=0,
        vmax=max(1, np.percentile(ratios, SHADES_END)),
        cmap="viridis",
    )
    figure.colorbar(image, ax=axes, extend="max", label="popularity / uniform share")
    return figure


def locality_plot(summary: TraceSummary, title: str) -> Figure:
    """Draw entropy, reuse, Jaccard index and dependence of the next layer, by layer, each with its value by chance."""
    layers, geometry = summary.by_layer, summary.geometry
    figure = Figure(figsize=(12, 7), layout="constrained")
    entropy, reuse, jaccard, dependence = figure.subplots(2, 2, sharex=True).flat
    _plot_layers(entropy, layers, [row.normalized_entropy for row in layers], "measured")
    entropy.axhline(1, **CHANCE, label="uniform popularity")
    entropy.set_title("Normalised entropy of popularity")
    _plot_layers(reuse, layers, [row.token_to_token_reuse for row in layers], "measured")
    reuse.axhline(geometry.top_k / geometry.num_experts, **CHANCE, label="by chance, uniform popularity")
    reuse.set_title("Reuse: share of a token's experts that the previous token used")
    _plot_layers(jaccard, layers, [row.jaccard for row in layers], "measured")
    _plot_layers(jaccard, layers, [row.jaccard_by_chance for row in layers], "by chance", **CHANCE)
    jaccard.set_title("Jaccard index of the experts of consecutive tokens")
    following = [row.next_layer.dependence if row.next_layer else None for row in layers]
    _plot_layers(dependence, layers, following, "measured")
    dependence.set_title("Dependence of the next layer (0: independent, 1: determined)")
    for axes in (entropy, reuse, jaccard):
        axes.legend(fontsize=8)
    for axes in (entropy, reuse, jaccard, dependence):
        axes.set_ylim(bottom=0)
    for axes in (jaccard, dependence):
        axes.set_xlabel("model layer")
    figure.suptitle(title)
    return figure


def reuse_distance_plot(summary: TraceSummary, title: str) -> Figure:
    """Draw the share of uses that recur within a number of tokens, one line per layer, light (first) to dark (last)."""
    layers = summary.by_layer
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    first, last = layers[0].layer, layers[-1].layer
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(first, max(last, first + 1)), "viridis_r")
    for row in layers:
        within = row.reuse_distance.within
        tokens = list(within)
        shares = [100 * share for share in within.values()]
        axes.plot(tokens, shares, marker="o", markersize=2, linewidth=1, color=shades.to_rgba(np.array([row.layer])))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.set_xlabel("distance (tokens)")
    axes.set_ylabel("uses whose expert is used again within the distance (%)")
    figure.colorbar(shades, ax=axes, label="model layer")
    figure.suptitle(title)
    return figure


def dependence_plot(summary: TraceSummary, title: str) -> Figure:
    """Draw the dependence of each pair of layers as a heat map; pairs without a value are grey."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    shares = np.array(summary.dependence, np.float64)
    image = axes.imshow(shares, interpolation="none", vmin=0, vmax=np.nan_to_num(shares).max() or 1, cmap="viridis")
    axes.set_facecolor("0.8")
    layers = summary.by_layer
    axes.set_xticks(*_layer_ticks(layers), fontsize=8)
    axes.set_yticks(*_layer_ticks(layers), fontsize=8)
    axes.set_xlabel("model layer")
    axes.set_ylabel("model layer")
    figure.colorbar(image, ax=axes, label="dependence: mutual information / maximum")
    figure.suptitle(title)
    return figure


def phases_plot(summary: TraceSummary, title: str) -> Figure:
    """Draw prefill and decode, by layer."""
    layers = summary.by_layer
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    entropy, reuse, distance = figure.subplots(1, 3)
    divided = [row.phases for row in layers if row.phases is not None]
    for name, phases in (("prefill", [row.prefill for row in divided]), ("decode", [row.decode for row in divided])):
        _plot_layers(entropy, layers, [phase.normalized_entropy for phase in phases], name)
        _plot_layers(reuse, layers, [phase.token_to_token_reuse for phase in phases], name)
    _plot_layers(distance, layers, [row.total_variation for row in divided], "measured")
    _plot_layers(distance, layers, [row.total_variation_by_chance for row in divided], "by chance", **CHANCE)
    entropy.set_title("Normalised entropy of popularity")
    reuse.set_title("Reuse: share of a token's experts\nthat the previous token used")
    distance.set_title("Total variation distance of the popularities\nin prefill and decode")
    for axes in (entropy, reuse, distance):
        axes.set_xlabel("model layer")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def contrast_plot(contrast: Contrast, title: str) -> Figure:
    """Draw the difference of selection rates from another trace set as a heat map of experts and layers."""
    layers = contrast.by_layer
    difference = 100 * np.array([row.difference for row in layers])
    largest = np.abs(difference).max() or 1
    figure, axes = _expert_axes(layers, f"{title}, compared with {contrast.other['source']}")
    image = axes.imshow(difference, aspect="auto", interpolation="none", vmin=-largest, vmax=largest, cmap="RdBu_r")
    figure.colorbar(image, ax=axes, label="difference of selection rates (percentage points)")
    return figure


def _expert_axes(layers: Layers, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(11, 2 + 0.16 * max(len(layers), 10)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(*_layer_ticks(layers), fontsize=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("model layer")
    figure.suptitle(title)
    return figure, axes


def _layer_ticks(layers: Layers) -> tuple[list[int], list[str]]:
    positions = list(range(0, len(layers), -(-len(layers) // MOST_TICKS)))
    return positions, [str(layers[position].layer) for position in positions]


def _plot_layers(axes: Axes, layers: Layers, values: Sequence[float | None], label: str, **style: Any) -> None:
    drawn = [np.nan if value is None else value for value in values]
    axes.plot([row.layer for row in layers], drawn, marker="o", markersize=3, label=label, **style)
    axes.grid(alpha=0.3)
