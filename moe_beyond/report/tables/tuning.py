"""The tables of ``moe-beyond tune``: strategies that were tried, and the choice on the held-out half."""

from typing import TYPE_CHECKING

from rich.table import Table

from moe_beyond.report.labels import BYTES_DEFINITION, NO_VALUE, score_lookahead
from moe_beyond.report.tables.conditions import format_conditions
from moe_beyond.report.tables.intervals import intervals_tables
from moe_beyond.report.tables.wrapping import WrappedTable

if TYPE_CHECKING:
    from moe_beyond.evaluation.tuning import TuningReport

SHOWN = 15
"""Number of tried strategies in the table."""


def tuning_tables(report: "TuningReport", bootstrap_draws: int) -> list[Table]:
    """Return the table of the best strategies that were tried, and that of the held-out half.

    Args:
        report: Report of a tuning.
        bootstrap_draws: Number of bootstrap draws of the intervals.
    """
    tried = WrappedTable(title=f"{len(report.tried):,} strategies on the tuning half, the best first", keys=(0, 1))
    for heading in ("strategy", "lookahead", "hit rate", "late", "bytes", "tok/s"):
        tried.add_column(heading, justify="left" if heading in ("strategy", "lookahead") else "right")
    for result in report.tried[:SHOWN]:
        speed = result.tokens_per_second
        tried.add_row(
            result.strategy,
            score_lookahead(result),
            f"{result.hit_rate:.1%}",
            f"{result.late_hits / max(result.accesses, 1):.1%}",
            f"{result.bytes_ratio:.2f}",
            NO_VALUE if speed is None else f"{speed:.2f}",
        )
    left = len(report.tried) - SHOWN
    more = [f"{left:,} more strategies: --json lists all"] if left > 0 else []
    tried.caption = "\n".join([BYTES_DEFINITION, f"conditions: {format_conditions(report.tried)}", *more])
    held_out = intervals_tables((), report.held_out, bootstrap_draws)[1]
    held_out.title = "held-out half, with 95 % intervals over sequences"
    return [tried, held_out]
