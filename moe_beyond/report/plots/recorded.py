"""The plot on a predictor's card: evaluations recorded by ``moe-beyond evaluate --record``."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from moe_beyond.report.labels import BYTES_AXIS, recorded_label
from moe_beyond.report.plots.replay import line_styles


def recorded_plot(evaluations: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw hit rate over bytes, one panel per evaluation and one line per strategy; up and to the left is better.

    Args:
        evaluations: ``figures`` of a predictor's configuration; at least one.
        title: Title of the figure.
    """
    figure = Figure(figsize=(7 * len(evaluations), 6), layout="constrained")
    for axes, evaluation in zip(figure.subplots(1, len(evaluations), squeeze=False)[0], evaluations, strict=True):
        by_label = _by_label(evaluation["replay"])
        styles = line_styles(line[0]["strategy"] for line in by_label.values())
        for (label, line), style in zip(by_label.items(), styles, strict=True):
            bytes_ratios, hit_rates = [row["bytes_ratio"] for row in line], [100 * row["hit_rate"] for row in line]
            axes.plot(bytes_ratios, hit_rates, marker="o", markersize=4, label=label, **style)
        shares = sorted({row["budget_share"] for row in evaluation["replay"]})
        budgets = ", ".join(f"{100 * share:.0f} %" for share in shares)
        axes.set_title(f"{evaluation['source']}; cache of {budgets} of all experts", size=9, color="0.35")
        axes.set_xlabel(BYTES_AXIS)
        axes.set_ylabel("hit rate (%)")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    return figure


def _by_label(replay: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group rows by legend, in ascending order of budgets."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(replay, key=lambda row: int(row["budget_slots"])):
        by_label.setdefault(recorded_label(row), []).append(row)
    return by_label
