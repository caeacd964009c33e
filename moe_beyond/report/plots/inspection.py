"""Pictures of a trace set."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_beyond.traces.analysis.summary import Contrast, LayerContrast, LayerSummary, TraceSummary

Layers = tuple[LayerSummary, ...] | tuple[LayerContrast, ...]

MOST_TICKS = 26
SHADES_END = 99.5
"""Percentile of popularity at which the shades of its heat map end: one busy expert would darken all others."""


def inspection_figures(summary: TraceSummary, contrast: Contrast | None = None) -> dict[str, Figure]:
    """Draw what there is to draw.

    Args:
        summary: Result of `moe_beyond.traces.analysis.statistics.summarize`.
        contrast: Result of `moe_beyond.traces.analysis.contrast.contrast_traces` (default: no figure of it).

    Returns:
        Name -> figure: ``popularity``, ``locality``, ``reuse_distance``; of more than one layer ``dependence``; of
        sequences that have both phases ``phases``; and ``contrast``.
    """
    title = f"{summary.geometry.model}, {summary.source}"
    drawn = {
        "popularity": popularity_figure(summary, title),
        "locality": locality_figure(summary, title),
        "reuse_distance": reuse_distance_figure(summary, title),
    }
    if len(summary.by_layer) > 1:
        drawn["dependence"] = dependence_figure(summary, title)
    if summary.phases:
        drawn["phases"] = phases_figure(summary, title)
    if contrast is not None:
        drawn["contrast"] = contrast_figure(contrast, title)
    return drawn


def popularity_figure(summary: TraceSummary, title: str) -> Figure:
    """Draw how popular each expert is, layer by layer, as a heat map."""
    layers = summary.by_layer
    times = np.array([row.popularity for row in layers]) * summary.geometry.num_experts
    figure, axes = _by_expert(layers, title)
    image = axes.imshow(
        times,
        aspect="auto",
        interpolation="none",
        vmin=0,
        vmax=max(1, np.percentile(times, SHADES_END)),
        cmap="viridis",
    )
    figure.colorbar(image, ax=axes, extend="max", label="popularity / even share")
    return figure


def locality_figure(summary: TraceSummary, title: str) -> Figure:
    """Draw by layer: entropy, reuse and Jaccard beside chance, and what a layer tells of the next."""
    layers, geometry = summary.by_layer, summary.geometry
    figure = Figure(figsize=(12, 7), layout="constrained")
    entropy, reuse, alike, dependence = figure.subplots(2, 2, sharex=True).flat
    _line(entropy, layers, [row.normalized_entropy for row in layers], "popularity")
    entropy.set_title("normalised entropy of popularity (1: all alike)")
    _line(reuse, layers, [row.token_to_token_reuse for row in layers], "measured")
    even = geometry.top_k / geometry.num_experts
    reuse.axhline(even, color="black", linestyle="--", label="even popularity, by chance")
    reuse.set_title("share of a token's experts that the one before used")
    _line(alike, layers, [row.jaccard for row in layers], "measured")
    _line(alike, layers, [row.jaccard_by_chance for row in layers], "by chance", color="black", linestyle="--")
    alike.set_title("Jaccard index of neighbouring tokens")
    _line(dependence, layers, [row.next_layer.dependence if row.next_layer else None for row in layers], "next layer")
    dependence.set_title("dependence of the next layer (0: none, 1: all)")
    for axes in (reuse, alike):
        axes.legend(fontsize=8)
    for axes in (reuse, alike, dependence):
        axes.set_ylim(bottom=0)
    for axes in (alike, dependence):
        axes.set_xlabel("model layer")
    figure.suptitle(title)
    return figure


def reuse_distance_figure(summary: TraceSummary, title: str) -> Figure:
    """Draw how soon experts are used again: a line a layer, from light (first) to dark (last)."""
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
    axes.set_xlabel("tokens")
    axes.set_ylabel("uses whose expert is used again within so many tokens (%)")
    figure.colorbar(shades, ax=axes, label="model layer")
    figure.suptitle(title)
    return figure


def dependence_figure(summary: TraceSummary, title: str) -> Figure:
    """Draw how much each layer's experts tell of each other layer's, as a heat map; grey where nothing is known."""
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
    figure.colorbar(image, ax=axes, label="dependence: mutual information / the most it could be")
    figure.suptitle(title)
    return figure


def phases_figure(summary: TraceSummary, title: str) -> Figure:
    """Draw prefill against decode, by layer."""
    layers = summary.by_layer
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    entropy, reuse, apart = figure.subplots(1, 3)
    divided = [row.phases for row in layers if row.phases is not None]
    for name, phases in (("prefill", [row.prefill for row in divided]), ("decode", [row.decode for row in divided])):
        _line(entropy, layers, [phase.normalized_entropy for phase in phases], name)
        _line(reuse, layers, [phase.token_to_token_reuse for phase in phases], name)
    _line(apart, layers, [row.total_variation for row in divided], "measured")
    by_chance = [row.total_variation_by_chance for row in divided]
    _line(apart, layers, by_chance, "by chance", color="black", linestyle="--")
    entropy.set_title("normalised entropy of popularity")
    reuse.set_title("share of a token's experts that the one before used")
    apart.set_title("total variation distance of their popularities")
    for axes in (entropy, reuse, apart):
        axes.set_xlabel("model layer")
        axes.legend(fontsize=8)
    for axes in (reuse, apart):
        axes.set_ylim(bottom=0)
    figure.suptitle(title)
    return figure


def contrast_figure(contrast: Contrast, title: str) -> Figure:
    """Draw by how much activation rates differ from those of another set, layer by layer, as a heat map."""
    layers = contrast.by_layer
    difference = 100 * np.array([row.difference for row in layers])
    largest = np.abs(difference).max() or 1
    figure, axes = _by_expert(layers, f"{title}, beside {contrast.other['source']}")
    image = axes.imshow(difference, aspect="auto", interpolation="none", vmin=-largest, vmax=largest, cmap="RdBu_r")
    figure.colorbar(image, ax=axes, label="difference of activation rates (percentage points)")
    return figure


def _by_expert(layers: Layers, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(11, 2 + 0.16 * max(len(layers), 10)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(*_layer_ticks(layers), fontsize=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("model layer")
    figure.suptitle(title)
    return figure, axes


def _layer_ticks(layers: Layers) -> tuple[list[int], list[str]]:
    places = list(range(0, len(layers), -(-len(layers) // MOST_TICKS)))
    return places, [str(layers[place].layer) for place in places]


def _line(axes: Axes, layers: Layers, values: Sequence[float | None], label: str, **style: Any) -> None:
    shown = [np.nan if value is None else value for value in values]
    axes.plot([row.layer for row in layers], shown, marker="o", markersize=3, label=label, **style)
    axes.grid(alpha=0.3)
