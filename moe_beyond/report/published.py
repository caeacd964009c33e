"""Table of the published predictors."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def published_table(predictors: Sequence[dict[str, Any]]) -> Table:
    """Lay out what `moe_beyond.published.published_figures` returned, a line a predictor."""
    table = Table(title="published predictors")
    table.add_column("name", no_wrap=True)
    table.add_column("MB", justify="right")
    table.add_column("lookaheads")
    table.add_column("recall@k, %", justify="right")
    table.add_column("hits @ bytes", justify="right")
    table.add_column("on")
    for one in predictors:
        lookaheads = ", ".join(map(str, one["lookaheads"]))
        size = f"{one['bytes'] / 1e6:.1f}"
        if not one["figures"]:
            table.add_row(one["name"], size, lookaheads, "-", "-", "nothing recorded")
        for figures in one["figures"]:
            recall = ", ".join(f"{100 * row['recall_at_k']:.1f}" for row in figures["metrics"])
            table.add_row(one["name"], size, lookaheads, recall, _best(figures["replay"]), figures["source"])
    table.caption = (
        "recall: by lookahead, in their order, over all tokens; hits: of the recorded strategy with most of them that "
        "moves no more than is demanded, at the smallest budget"
    )
    return table


def _best(replay: Sequence[dict[str, Any]]) -> str:
    own = [row for row in replay if row["predictor"] is not None and row["bytes_ratio"] <= 1]
    if not own:
        return "-"
    slots = min(row["budget_slots"] for row in own)
    best = max((row for row in own if row["budget_slots"] == slots), key=lambda row: row["hit_rate"])
    return f"{best['hit_rate']:.1%} @ {best['bytes_ratio']:.2f} ({slots} slots)"
