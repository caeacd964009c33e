"""The picture on a predictor's card: what `evaluate --record` put into its configuration."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from moe_beyond.report.plots.replay import OPTIMUM, styles_of
from moe_beyond.report.tables.results import leaks_of


def recorded_figure(evaluations: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw hit rate against bytes, a panel an evaluation, a line a strategy: up and to the left is better.

    Args:
        evaluations: ``figures`` of a predictor's configuration; at least one.
        title: What the predictor is.
    """
    figure = Figure(figsize=(7 * len(evaluations), 6), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(evaluations), squeeze=False)[0], evaluations, strict=True):
        lines = _lines(one["replay"])
        styles = styles_of(line[0]["strategy"] for line in lines.values())
        for (name, line), style in zip(lines.items(), styles, strict=True):
            bytes_moved, hits = [row["bytes_ratio"] for row in line], [100 * row["hit_rate"] for row in line]
            axes.plot(bytes_moved, hits, marker="o", markersize=4, label=name, **style)
        shares = sorted({row["budget_share"] for row in one["replay"]})
        budgets = ", ".join(f"{100 * share:.0f} %" for share in shares)
        axes.set_title(f"{one['source']}; room for {budgets} of all experts", size=9, color="0.4")
        axes.set_xlabel("bytes moved / bytes demanded")
        axes.set_ylabel("hit rate (%)")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    return figure


def recorded_name(row: dict[str, Any]) -> str:
    """Name a recorded strategy, with the lookahead of its scores; mark scores that no runtime could use."""
    if row["strategy"] == OPTIMUM:
        return f"{OPTIMUM} (optimum without prefetch)"
    if row["predictor"] is None:
        return str(row["strategy"])
    ahead = "all scores" if row["lookahead"] is None else f"lookahead {row['lookahead']}"
    leaks = leaks_of(row.get("leaks", row["lookahead"] == 0), row.get("causal", True))
    return f"{row['strategy']}, {ahead}{' (LEAK: ' + ', '.join(leaks) + ')' if leaks else ''}"


def _lines(replay: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Gather the rows of each strategy by ascending budget."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(replay, key=lambda row: int(row["budget_slots"])):
        lines.setdefault(recorded_name(row), []).append(row)
    return lines
