"""Tables of the published predictors."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moe_beyond.predictors.training_text import marked, relation_of_figures
from moe_beyond.report.tables.fitted import FittedTable

NOTHING = "nothing recorded"


def pretrained_tables(predictors: Sequence[dict[str, Any]]) -> list[Table]:
    """Lay out what `moe_beyond.pretrained.pretrained_figures` returned, a table for each trace set measured on."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for one in predictors:
        name, size = one["name"], f"{one['bytes'] / 1e6:.1f}"
        for figures in one["figures"]:
            recall = ", ".join(f"{row['lookahead']}: {100 * row['recall_at_k']:.1f}" for row in figures["metrics"])
            split = "" if figures["split"] is None else f", split {figures['split']}"
            source = marked(f"{figures['source']}{split}", relation_of_figures(one["training"], figures))
            rows.setdefault(source, []).append((name, size, recall, *_best(figures["replay"])))
        if not one["figures"]:
            rows.setdefault(NOTHING, []).append((name, size, ", ".join(map(str, one["lookaheads"])), "-", "-"))
    tables: list[Table] = []
    for source, found in rows.items():
        what = source if source == NOTHING else f"on {source}"
        table = FittedTable(title=f"published predictors, {what}", min_width=len(what) + 24)
        table.add_column("name", no_wrap=True)
        table.add_column("MB", justify="right")
        table.add_column("lookahead: recall@k, %")
        table.add_column("slots", justify="right")
        table.add_column("hits @ bytes", justify="right")
        for row in found:
            table.add_row(*row)
        tables.append(table)
    if tables:
        tables[-1].caption = (
            "recall: over all tokens; hits: of the recorded strategy with most of them that moves no more than is "
            "demanded, at the smallest budget"
        )
    return tables


def _best(replay: Sequence[dict[str, Any]]) -> tuple[str, str]:
    own = [row for row in replay if row["predictor"] is not None and row["bytes_ratio"] <= 1]
    if not own:
        return "-", "-"
    slots = min(row["budget_slots"] for row in own)
    best = max((row for row in own if row["budget_slots"] == slots), key=lambda row: row["hit_rate"])
    return f"{slots:,}", f"{best['hit_rate']:.1%} @ {best['bytes_ratio']:.2f}"
