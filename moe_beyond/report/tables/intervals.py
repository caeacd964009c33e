"""The table of 95 % intervals that ``moe-beyond evaluate --bootstrap`` shows."""

from collections.abc import Sequence

from rich.table import Table

from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.report.tables.fitted import FittedTable
from moe_beyond.simulator import Result


def intervals_tables(metrics: Sequence[LookaheadMetrics], results: Sequence[Result], resamples: int) -> list[Table]:
    """Lay out the results of an evaluation with intervals.

    Args:
        metrics: One row per lookahead, with ``intervals``.
        results: One record per strategy, with ``intervals``.
        resamples: Number of draws of sequences.

    Returns:
        A table of recall, and one of replays: each figure with its interval, then that of its difference from LRU.
    """
    recall = FittedTable(title="recall with 95 % intervals over sequences")
    recall.add_column("lookahead")
    recall.add_column(f"recall@{metrics[0].k}, %" if metrics else "recall, %", justify="right")
    for row in metrics:
        words = interval_words(row.recall_at_k, (row.intervals or {})["recall_at_k"], shares=True)
        recall.add_row(str(row.lookahead), words)
    timed = any(result.tokens_per_second is not None for result in results)
    replays = FittedTable(title="replays with 95 % intervals over sequences", keys=(0, 1, 2))
    for name in ("slots", "strategy", "ahead", "hits, %", "bytes", *(("tok/s",) if timed else ())):
        replays.add_column(name, justify="left" if name in ("strategy", "ahead") else "right")
    before = None
    for result in results:
        if before is not None and result.budget_slots != before:
            replays.add_section()
        before = result.budget_slots
        ahead = "-" if result.predictor is None else str(result.lookahead or "all")
        replays.add_row(f"{result.budget_slots:,}", result.strategy, ahead, *_cells(result, timed))
    replays.caption = (
        f"{resamples:,} draws of sequences, the same for all strategies; second lines: the difference from lru at the "
        "same slots"
    )
    return [recall, replays]


def interval_words(value: float, ends: Sequence[float], *, shares: bool = False) -> str:
    """Write a figure with its interval: ``76.4 (75.9..77.0)``; shares in percent, others with two digits."""
    shape, scale = (".1f", 100) if shares else (".2f", 1)
    low, high = (format(scale * end, shape) for end in ends)
    return f"{format(scale * value, shape)} ({low}..{high})"


def _cells(result: Result, timed: bool) -> list[str]:
    """Write a result's figures, each with the interval of its difference from LRU below."""
    intervals = result.intervals or {}
    cells = []
    for name in ("hit_rate", "bytes_ratio", *(("tokens_per_second",) if timed else ())):
        shares = name == "hit_rate"
        if name not in intervals:
            cells.append("-")
            continue
        words = interval_words(getattr(result, name), intervals[name], shares=shares)
        if "minus_lru" in intervals:
            low, high = (
                format(100 * end, "+.1f") if shares else format(end, "+.2f") for end in intervals["minus_lru"][name]
            )
            words += f"\n{low}..{high}"
        cells.append(words)
    return cells
