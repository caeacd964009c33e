"""Tables of prediction metrics and replay results."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moe_beyond.cache.misses import MOVE
from moe_beyond.geometry import Geometry
from moe_beyond.report.labels import (
    BYTES_DEFINITION,
    DEMAND_RATIO_DEFINITION,
    METRIC_COLUMNS,
    NO_VALUE,
    metric_lookahead,
    result_leaks,
    score_lookahead,
)
from moe_beyond.report.tables.conditions import format_conditions
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.simulator import Result

if TYPE_CHECKING:
    from moe_beyond.evaluation.results import CheckpointEvaluation, Unavailable
    from moe_beyond.metrics import LookaheadMetrics


def metrics_table(rows: Sequence["LookaheadMetrics"], note: str = "") -> Table:
    """Return the table of prediction metrics, one row per lookahead.

    Args:
        rows: Result of `RoutingMetrics.rows`.
        note: End of the title (default: empty).
    """
    table = WrappedTable(title=f"prediction over {rows[0].tokens:,} tokens, k = {rows[0].k}{note}")
    table.add_column("lookahead")
    columns = {name: column for name, column in METRIC_COLUMNS.items() if name in rows[0].figures()}
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        values = (format(getattr(row, name), form) for name, (_, form) in columns.items())
        table.add_row(metric_lookahead(row.lookahead, row.causal), *values)
    lines = [
        "recall@k = share of a token's experts among the k with the highest scores, averaged over tokens and layers",
        "micro F1, macro F1, exact: experts with a score above 0.5 count as predicted",
        "NLL: nats per token and layer; cal. error: mean distance of predicted probability and observed frequency",
        "two-class F1, accuracy: MoE-Beyond's metrics per label; predicting no expert already scores high",
    ]
    if rows[0].gate_mass_at_k is not None:
        lines.insert(1, "gate mass@k = share of a token's gate weights on the k experts with the highest scores")
    table.caption = "\n".join(lines)
    return table


def results_table(results: Sequence[Result], geometry: Geometry) -> Table:
    """Return the table of replay results, one row per strategy and budget.

    Args:
        results: Results of one command, budget by budget; at least one.
        geometry: Geometry of the model.
    """
    timed, measured = any(result.device for result in results), any(result.measured for result in results)
    kind = "run" if measured else "replay"
    title = f"{kind} over {results[0].demanded:,} accesses ({geometry.describe_shape()})"
    table = WrappedTable(title=title, keys=(0, 2, 3))
    table.add_column("slots (share)", justify="right", no_wrap=True)
    table.add_column("demand\nratio", justify="right", no_wrap=True)
    table.add_column("strategy")
    table.add_column("look-\nahead")
    hosted = any(result.miss_handling != MOVE for result in results)
    counted = ("hit rate", "late", *(("on\nhost",) if hosted else ()), "bytes", "wasted %")
    for name in counted if timed else ("hit rate", "bytes", "prefetched", "wasted"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("tok/s", "stall\nms", "p95\nms") if timed else ():
        table.add_column(name, justify="right", no_wrap=True)
    budget = results[0].budget_slots
    for result in results:
        if result.budget_slots != budget:
            table.add_section()
            budget = result.budget_slots
        late = f"{result.late_hits / max(result.accesses, 1):.1%}"
        bytes_ratio = f"{result.bytes_ratio:.2f}"
        on_host = (f"{result.on_host / max(result.accesses, 1):.1%}",) if hosted else ()
        transfers = (late, *on_host, bytes_ratio) if timed else (bytes_ratio, f"{result.prefetch_transfers:,}")
        wasted = result.wasted_prefetches
        times = (result.tokens_per_second, result.stall_ms_per_token, result.token_ms_p95) if timed else ()
        table.add_row(
            f"{result.budget_slots:,} ({result.budget_share:.1%})",
            f"{result.demand_ratio:.2f}",
            result.strategy,
            score_lookahead(result),
            f"{result.hit_rate:.1%}",
            *transfers,
            f"{wasted / max(result.accesses, 1):.1%}" if timed else f"{wasted:,}",
            *(NO_VALUE if time is None else f"{time:.1f}" for time in times),
        )
    table.caption = "\n".join(_results_caption(results))
    return table


def _results_caption(results: Sequence[Result]) -> list[str]:
    device = next((result.device for result in results if result.device), None)
    measured = any(result.measured for result in results)
    predictors = sorted({result.predictor for result in results if result.predictor})
    lines = [BYTES_DEFINITION, DEMAND_RATIO_DEFINITION]
    if device is None:
        lines.append("prefetched: transfers before demand; wasted: prefetched experts that no token used in time")
    else:
        lines += [
            "late: requested but still in transit when demanded; wasted %: prefetched experts that no token used "
            "in time; both as shares of accesses",
            f"tok/s, stall and p95 per decoded token: measured on {device}, without sampling and printing"
            if measured
            else f"tok/s, stall and p95 per decoded token: timing model of {device}, not a measurement",
        ]
    if any(result.miss_handling != MOVE for result in results):
        lines.append("on host: accesses that the host computed; the output equals the model's up to rounding")
    if measured:
        lines.append("compute_ms_per_token in JSON: forwards without stall; cache core and predictor count")
    if predictors:
        lines.append(f"scores: {', '.join(predictors)}")
    leaks = {leak for result in results if result.predictor for leak in result_leaks(result)}
    if leaks:
        lines.append(f"LEAK: the predictor {' and '.join(sorted(leaks))}; no runtime can use such scores")
    notes = {result.strategy: result.note for result in results if result.note}
    lines += [f"{strategy}: {note}" for strategy, note in notes.items()]
    return [*lines, f"conditions: {results[0].scope} cache; {format_conditions(results)}"]


def unavailable_lines(unavailable: Sequence["Unavailable"]) -> list[str]:
    """Return one line per strategy that cannot be replayed, with the reason."""
    return [f"{entry.strategy}: not available: {entry.reason}" for entry in unavailable]


def checkpoints_table(rows: Sequence["CheckpointEvaluation"], geometry: Geometry) -> Table:
    """Return the table of a run's checkpoints: recall of every lookahead, then hit rate @ bytes of every strategy.

    Args:
        rows: Evaluations of the checkpoints, one table row each; at least one.
        geometry: Geometry of the model.
    """
    first = rows[0].evaluation
    table = WrappedTable(title=f"checkpoints over {first.metrics[0].tokens:,} tokens")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("step", justify="right")
    for row in first.metrics:
        lookahead = metric_lookahead(row.lookahead, row.causal)
        table.add_column(f"recall@{row.k}\nlookahead {lookahead}", justify="right")
    for result in first.results:
        lookahead = "" if result.predictor is None else f"\nlookahead {score_lookahead(result)}"
        table.add_column(f"{result.strategy}\n{result.budget_slots} slots{lookahead}", justify="right")
    for checkpoint in rows:
        recalls = [f"{row.recall_at_k:.1%}" for row in checkpoint.evaluation.metrics]
        replays = [f"{result.hit_rate:.1%} @ {result.bytes_ratio:.2f}" for result in checkpoint.evaluation.results]
        table.add_row(checkpoint.checkpoint, f"{checkpoint.step:,}", *recalls, *replays)
    table.caption = f"replays: hit rate @ bytes; {BYTES_DEFINITION}; {geometry.describe_shape()}"
    return table
