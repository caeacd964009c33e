"""The figures of a fit's best epoch, from the files that `moe-beyond fit` logs."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moe_beyond.metrics.names import HEADLINE
from moe_beyond.report.tables.wrapping import WrappedTable

SELECTED_BY = f"val/{HEADLINE}"
BUDGET, LOOKAHEAD = "val_budget_", "val_lookahead_"
STRATEGIES = {"with the predictor": "", "LRU": "lru_", "Belady": "belady_"}
"""Column of the table -> prefix of its figures: the strategy of the callback, and the baselines."""


def best_epoch_tables(logs: Sequence[Path]) -> list[Table | str]:
    """Return recall as a line, and hits and bytes on the validation split as a table.

    Args:
        logs: Files ``metrics.csv`` of a fit and of the fits that resumed it.
    """
    rows = [row for log in logs for row in csv.DictReader(log.open()) if row.get(SELECTED_BY)]
    best = max(rows, key=lambda row: float(row[SELECTED_BY]))
    sections = sorted({name.partition("/")[0] for name in best if name.startswith(LOOKAHEAD)})
    recalls = (  # that of the first lookahead is the headline
        f"{section.removeprefix(LOOKAHEAD)}: {float(best.get(f'{section}/{HEADLINE}') or best[SELECTED_BY]):.1%}"
        for section in sections
    )
    table = WrappedTable(title="validation, hit rate @ bytes")
    table.add_column("budget")
    for name in STRATEGIES:
        table.add_column(name, justify="right")
    for budget in sorted({name.partition("/")[0] for name in best if name.startswith(BUDGET)}):
        cells = (
            f"{float(best[f'{budget}/{prefix}hit_rate']):.1%} @ {float(best[f'{budget}/{prefix}bytes_ratio']):.2f}"
            for prefix in STRATEGIES.values()
        )
        table.add_row(budget.removeprefix(BUDGET).replace("pct", "%"), *cells)
    return [f"    epoch {int(float(best['epoch'])) + 1}, lookahead: recall@k: {', '.join(recalls)}", table]
