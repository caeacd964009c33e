"""Tables of metrics and replay results."""

from collections.abc import Sequence

from rich.table import Table

from moe_beyond.evaluation.results import CheckpointEvaluation, Unavailable
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.report.tables.conditions import conditions
from moe_beyond.report.tables.fitted import FittedTable
from moe_beyond.simulator import Result

# Gate mass is there where gate weights are.
FIGURES = {
    "recall_at_k": ("recall@k", ".1%"),
    "gate_mass_at_k": ("gate mass@k", ".1%"),
    "f1_micro": ("micro F1", ".1%"),
    "f1_macro": ("macro F1", ".1%"),
    "average_precision": ("avg. precision", ".1%"),
    "exact_match": ("exact", ".1%"),
    "nll": ("NLL", ".2f"),
    "calibration_error": ("cal. error", ".2%"),
    "f1_two_class": ("two-class F1", ".1%"),
    "accuracy": ("accuracy", ".1%"),
}


def metrics_table(rows: Sequence[LookaheadMetrics]) -> Table:
    """Lay out metrics, one line per lookahead."""
    table = FittedTable(title=f"prediction over {rows[0].tokens:,} tokens, k = {rows[0].k}")
    table.add_column("lookahead")
    shown = {name: how for name, how in FIGURES.items() if name in rows[0].figures()}
    for heading, _ in shown.values():
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (format(getattr(row, name), shape) for name, (_, shape) in shown.items())
        table.add_row(lookahead_words(row.lookahead, row.causal), *figures)
    mass = (
        "gate mass: the share of a token's gate weights that is found; " if rows[0].gate_mass_at_k is not None else ""
    )
    table.caption = (
        f"recall ranks the scores (where k = K it is F1); {mass}micro, macro and exact cut them at 0.5; NLL (nats a "
        "token and layer) and calibration error take them as probabilities; two-class F1 and accuracy (per label) are "
        "MoE-Beyond's, and high by construction: predicting nothing is mostly right"
    )
    return table


def results_table(results: Sequence[Result], geometry: Geometry) -> Table:
    """Lay out replay results, a line a strategy."""
    timed = any(result.device for result in results)
    table = FittedTable(
        title=f"replay over {results[0].demanded:,} accesses ({geometry.describe_shape()})", keys=(0, 2, 3)
    )
    table.add_column("slots (share)", justify="right", no_wrap=True)
    table.add_column("slots /\ndemand", justify="right", no_wrap=True)
    table.add_column("strategy")
    table.add_column("look-\nahead")
    for name in ("hits", "late", "bytes", "wasted") if timed else ("hits", "bytes", "prefetched", "wasted"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("tok/s", "stall\nms", "p95\nms") if timed else ():
        table.add_column(name, justify="right", no_wrap=True)
    before = results[0].budget_slots
    for result in results:
        if result.budget_slots != before:
            table.add_section()
            before = result.budget_slots
        late = f"{result.late_hits / max(result.accesses, 1):.1%}"
        moved = f"{result.bytes_ratio:.2f}"
        counts = (late, moved) if timed else (moved, f"{result.prefetch_transfers:,}")
        times = (result.tokens_per_second, result.stall_ms_per_token, result.token_ms_p95) if timed else ()
        table.add_row(
            f"{result.budget_slots:,} ({result.budget_share:.1%})",
            f"{result.demand_ratio:.2f}",
            result.strategy,
            "-" if result.predictor is None else scores_words(result),
            f"{result.hit_rate:.1%}",
            *counts,
            f"{result.wasted_prefetches / max(result.accesses, 1):.1%}" if timed else f"{result.wasted_prefetches:,}",
            *("-" if time is None else f"{time:.1f}" for time in times),
        )
    table.caption = _caption(results)
    return table


def unavailable_lines(missing: Sequence[Unavailable]) -> list[str]:
    """Say, a line a strategy, what each lacks."""
    return [f"{one.strategy}: not available: {one.why}" for one in missing]


def _caption(results: Sequence[Result]) -> str:
    predictors = sorted({result.predictor for result in results if result.predictor})
    said = [
        f"{results[0].scope} cache{', scores of ' + ', '.join(predictors) if predictors else ''}",
        "bytes: all transfers over accesses (1.00 moves one expert for every access)",
        "slots / demand: below 1 not even one token's experts fit",
    ]
    leaks = {
        words
        for result in results
        if result.predictor
        for words in leaks_of(result.leaks or result.lookahead == 0, result.causal)
    }
    if leaks:
        said.append(f"LEAK: {', '.join(sorted(leaks))}, which no runtime could")
    if device := next((result.device for result in results if result.device), None):
        said += [f"times on {device}", "late: asked for, and not there when needed (in bytes, not in wasted)"]
    notes = {result.strategy: result.note for result in results if result.note}
    said += [f"{name}: {note}" for name, note in notes.items()]
    return f"{'; '.join(said)}\nconditions: {conditions(results)}"


def checkpoints_table(rows: Sequence[CheckpointEvaluation], geometry: Geometry) -> Table:
    """Lay out a run's checkpoints, a line each: recall by lookahead, then hits @ bytes of every strategy."""
    first = rows[0].evaluation
    table = FittedTable(title=f"checkpoints over {first.metrics[0].tokens:,} tokens")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("step", justify="right")
    for row in first.metrics:
        ahead = lookahead_words(row.lookahead, row.causal)
        table.add_column(f"recall@{row.k}\nahead: {ahead}", justify="right")
    for result in first.results:
        ahead = "" if result.predictor is None else f"\nahead: {scores_words(result)}"
        table.add_column(f"{result.strategy}\n{result.budget_slots} slots{ahead}", justify="right")
    for found in rows:
        recalls = [f"{row.recall_at_k:.1%}" for row in found.evaluation.metrics]
        hits = [f"{result.hit_rate:.1%} @ {result.bytes_ratio:.2f}" for result in found.evaluation.results]
        table.add_row(found.checkpoint, f"{found.step:,}", *recalls, *hits)
    table.caption = f"ahead: lookahead; cells: hit rate @ bytes over demanded bytes; {geometry.describe_shape()}"
    return table


def lookahead_words(lookahead: Lookahead | None, causal: bool = True) -> str:
    """Name a lookahead, and mark scores that no runtime could use."""
    leaks = leaks_of(lookahead == 0, causal)
    return f"{lookahead} (LEAK: {', '.join(leaks)})" if leaks else str(lookahead)


def leaks_of(reads_router_input: bool, causal: bool) -> list[str]:
    """Say what scores know that no runtime could."""
    return ["reads the router's input"] * reads_router_input + ["sees later tokens"] * (not causal)


def scores_words(result: Result) -> str:
    """Name the lookahead that a strategy asked by, or that it read all scores there are; mark leaks."""
    words = "all" if result.lookahead is None else str(result.lookahead)
    return f"{words} (LEAK)" if leaks_of(result.leaks or result.lookahead == 0, result.causal) else words
