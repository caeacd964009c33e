"""Pictures of replay results."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moe_beyond.files import replacing
from moe_beyond.replay import Result
from moe_beyond.report.results import lookahead_words

BOUND = "belady"


def plot_budgets(results: Sequence[Result], path: str | Path, title: str) -> None:
    """Plot hit rate and bytes against the budget, a line a strategy.

    Args:
        results: Of several budgets.
        path: The PNG to write.
        title: What the traces are.
    """
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        ahead = "" if result.lookahead is None else f", lookahead {lookahead_words(result.lookahead, result.causal)}"
        who = f" by {result.predictor}{ahead}" if result.prefetch != "none" else ""
        lines.setdefault(f"{result.strategy}{who}", []).append(result)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    hits, bytes_moved = figure.subplots(1, 2)
    for name, line in lines.items():
        style, label = ("--", f"{name} (optimum without prefetch)") if name == BOUND else ("-", name)
        shares = [100 * result.budget_share for result in line]
        hits.plot(shares, [100 * result.hit_rate for result in line], style, marker="o", markersize=3, label=label)
        bytes_moved.plot(shares, [result.bytes_ratio for result in line], style, marker="o", markersize=3)
    one_token = 100 * results[0].budget_share / results[0].demand_ratio
    for axes in (hits, bytes_moved):
        axes.axvline(one_token, color="0.8", linewidth=1, zorder=0)
        axes.set_xlabel("experts that fit (% of all)")
        axes.set_xlim(0, 100)
        axes.grid(alpha=0.3)
    hits.annotate(
        "one token's experts", (one_token, 95), xytext=(4, 0), textcoords="offset points", color="0.5", size=8
    )
    hits.set_ylabel("hit rate (%)")
    hits.set_ylim(0, 101)
    hits.legend(loc="lower right", fontsize=8)
    bytes_moved.set_ylabel("bytes moved / bytes demanded")
    bytes_moved.set_ylim(bottom=0)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
