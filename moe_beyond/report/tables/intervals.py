"""The tables of 95 % intervals of ``moe-beyond evaluate --bootstrap``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moe_beyond.report.labels import BYTES_DEFINITION, NO_VALUE, metric_lookahead, score_lookahead
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.simulator import Result

if TYPE_CHECKING:
    from moe_beyond.metrics import LookaheadMetrics


def intervals_tables(
    metrics: Sequence["LookaheadMetrics"], results: Sequence[Result], bootstrap_draws: int
) -> list[Table]:
    """Return the tables of an evaluation with intervals.

    Args:
        metrics: Rows of metrics with ``intervals``, one per lookahead.
        results: Results with ``intervals``, one per strategy and budget.
        bootstrap_draws: Number of bootstrap draws.

    Returns:
        The table of recall, and the table of replays: each value with its interval, and below it the interval of its
        difference from LRU.
    """
    recall = WrappedTable(title="recall with 95 % intervals over sequences")
    recall.add_column("lookahead")
    recall.add_column(f"recall@{metrics[0].k}, %" if metrics else "recall, %", justify="right")
    for row in metrics:
        text = format_interval(row.recall_at_k, (row.intervals or {})["recall_at_k"], percent=True)
        recall.add_row(metric_lookahead(row.lookahead, row.causal, short=True), text)
    timed = any(result.tokens_per_second is not None for result in results)
    replays = WrappedTable(title="replays with 95 % intervals over sequences", keys=(0, 1, 2))
    for heading in ("slots", "strategy", "lookahead", "hit rate, %", "bytes", *(("tok/s",) if timed else ())):
        replays.add_column(heading, justify="left" if heading in ("strategy", "lookahead") else "right")
    budget = None
    for result in results:
        if budget is not None and result.budget_slots != budget:
            replays.add_section()
        budget = result.budget_slots
        replays.add_row(f"{budget:,}", result.strategy, score_lookahead(result), *_cells(result, timed))
    replays.caption = (
        f"{BYTES_DEFINITION}\n"
        f"{bootstrap_draws:,} bootstrap draws of sequences, the same for all strategies\n"
        "second lines: 95 % interval of the difference from lru at the same budget"
    )
    return [recall, replays]


def format_interval(value: float, ends: Sequence[float], *, percent: bool = False) -> str:
    """Format a value with its interval, such as ``76.4 (75.9..77.0)``.

    Args:
        value: Value to format.
        ends: Lower and upper end of the interval.
        percent: Whether to write shares in percent with one decimal (default: two decimals, no scaling).
    """
    form, scale = (".1f", 100) if percent else (".2f", 1)
    low, high = (format(scale * end, form) for end in ends)
    return f"{format(scale * value, form)} ({low}..{high})"


def _cells(result: Result, timed: bool) -> list[str]:
    intervals = result.intervals or {}
    cells = []
    for name in ("hit_rate", "bytes_ratio", *(("tokens_per_second",) if timed else ())):
        percent = name == "hit_rate"
        if name not in intervals:
            cells.append(NO_VALUE)
            continue
        text = format_interval(getattr(result, name), intervals[name], percent=percent)
        if "minus_lru" in intervals:
            low, high = (
                format(100 * end, "+.1f") if percent else format(end, "+.2f") for end in intervals["minus_lru"][name]
            )
            text += f"\n{low}..{high}"
        cells.append(text)
    return cells
