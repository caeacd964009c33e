"""The tables of ``moe-beyond list``: the pretrained predictors."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moe_beyond.predictors.training_text import mark_relation, relation_of_figures
from moe_beyond.report.labels import BYTES_DEFINITION, NO_VALUE
from moe_beyond.report.tables.wrapping import WrappedTable

NOT_EVALUATED = "no evaluation recorded"


def pretrained_tables(predictors: Sequence[dict[str, Any]]) -> list[Table]:
    """Return one table per trace set that predictors were evaluated on.

    Args:
        predictors: Result of `moe_beyond.pretrained.pretrained_figures`.
    """
    rows: dict[str, list[tuple[str, ...]]] = {}
    for predictor in predictors:
        name, size = predictor["name"], _megabytes(predictor["bytes"])
        for figures in predictor["figures"]:
            recall = ", ".join(f"{row['lookahead']}: {100 * row['recall_at_k']:.1f}" for row in figures["metrics"])
            split = "" if figures["split"] is None else f", split {figures['split']}"
            source = mark_relation(f"{figures['source']}{split}", relation_of_figures(predictor["training"], figures))
            rows.setdefault(source, []).append((name, size, recall, *_best(figures["replay"])))
        if not predictor["figures"]:
            lookaheads = ", ".join(map(str, predictor["lookaheads"]))
            rows.setdefault(NOT_EVALUATED, []).append((name, size, lookaheads, NO_VALUE, NO_VALUE))
    tables: list[Table] = []
    for source, rows_of_source in rows.items():
        subtitle = source if source == NOT_EVALUATED else f"evaluated on {source}"
        table = WrappedTable(title=f"pretrained predictors, {subtitle}", min_width=len(subtitle) + 25)
        table.add_column("name", no_wrap=True)
        table.add_column("MB", justify="right")
        table.add_column("lookahead: recall@k, %")
        table.add_column("slots", justify="right")
        table.add_column("hit rate @ bytes", justify="right")
        for cells in rows_of_source:
            table.add_row(*cells)
        tables.append(table)
    if tables:
        tables[-1].caption = (
            f"{BYTES_DEFINITION}\n"
            "hit rate: highest among the recorded strategies with bytes of at most 1.00, at the smallest budget"
        )
    return tables


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 1e5 else f"{size / 1e6:.2f}"


def _best(replay: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return the slots, and the hit rate @ bytes, of the best strategy that uses the predictor."""
    rows = [row for row in replay if row["predictor"] is not None and row["bytes_ratio"] <= 1]
    if not rows:
        return NO_VALUE, NO_VALUE
    slots = min(row["budget_slots"] for row in rows)
    best = max((row for row in rows if row["budget_slots"] == slots), key=lambda row: row["hit_rate"])
    return f"{slots:,}", f"{best['hit_rate']:.1%} @ {best['bytes_ratio']:.2f}"
