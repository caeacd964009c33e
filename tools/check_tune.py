"""Compare the choice of `moe-beyond tune` with the best strategy of an exhaustive grid.

    python tools/check_tune.py --traces TRACES [--device DEVICE] [--budget BUDGET] [--json FILE]

The choice reads one half of the conversations only. The grid has every policy, prefetcher, threshold, lookahead and
scope, and its best strategy is selected on the other half, so it knows more than any tuning could. The exit code is 1
if the choice is below 98 % of that strategy, or below LRU. On WebGLM it takes a quarter of an hour on one core.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_beyond.evaluation.checkpoints import find_source
from moe_beyond.evaluation.engine import replay_sequences
from moe_beyond.evaluation.options import SCOPES, ReplayOptions
from moe_beyond.evaluation.resolve import resolve_budgets, resolve_settings
from moe_beyond.evaluation.search import Space
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import grid
from moe_beyond.evaluation.tuning import TuningReport, run_tuning
from moe_beyond.files import write_json
from moe_beyond.simulator import Result
from moe_beyond.traces.reader import TraceSet

DEVICES, BUDGETS = ("rtx4060-laptop", "jetson-orin-nano"), ("10%", "20%")
PREDICTOR, PROFILE = "cross_layer.deepseek-v2-lite-puffin", "history.deepseek-v2-lite-puffin"
LEAST_SHARE = 0.98
"""Share of the best speed that the choice must reach."""
AT_ONCE = 64
"""Strategies that are replayed together."""


def grid_results(
    options: ReplayOptions, traces: TraceSet, source: ScoreSource | None, tuned: TuningReport
) -> list[Result]:
    """Replay the grid on the held-out half.

    Args:
        options: Options with a device and one budget.
        traces: Trace set of both halves.
        source: Source of scores; None without scores.
        tuned: Report with the halves.
    """
    shared, slots = resolve_settings(options, traces), resolve_budgets(options, traces)
    geometry = traces.geometry
    policies = Space(geometry, shared.common, slots[0], None, source, shared.profile).policies()
    prefetches, lookaheads = ["none"], []
    if source is not None:
        thresholds = (f"p>{number / 10:g}" for number in range(1, 10))
        tops = (f"top{number}" for number in dict.fromkeys((1, geometry.top_k // 2 or 1, geometry.top_k)))
        prefetches += [*tops, *thresholds, "moe_infinity", "adaptive", "adaptive,p>0.3"]
        lookaheads = [each for each in source.lookaheads if each != "next"]
    settings = [
        each
        for scope in SCOPES
        if scope == "global" or slots[0] >= geometry.demand_per_token
        for each in grid(replace(shared.common, scope=scope), slots, policies, prefetches, source, lookaheads)
    ]
    results = []
    for start in track(range(0, len(settings), AT_ONCE), description=f"{options.device}, {options.budget[0]}"):
        part = settings[start : start + AT_ONCE]
        results += replay_sequences(geometry, part, tuned.halves.held_out, shared.profile)
    return results


def compared(
    options: ReplayOptions, traces: TraceSet, source: ScoreSource | None, predictor: str | None
) -> dict[str, str | int | float]:
    """Tune, replay the grid, and return one row of the table.

    Args:
        options: Options with a device and one budget.
        traces: Trace set of both halves.
        source: Source of scores; None without scores.
        predictor: Name of the source's predictor.
    """
    tuned = run_tuning(options, traces, source, aim="tokens", predictor=predictor)
    results = grid_results(options, traces, source, tuned)
    speed = tuned.aim.value
    choice, lru, best = tuned.held_out[0], tuned.held_out[-2], max(results, key=speed)
    return {
        "device": str(options.device), "budget": options.budget[0], "tried": len(tuned.tried), "choice": named(choice),
        "choice tok/s": speed(choice), "lru tok/s": speed(lru), "grid": len(results), "best": named(best),
        "best tok/s": speed(best), "share": speed(choice) / speed(best),
        "holds": speed(choice) >= max(LEAST_SHARE * speed(best), speed(lru)),
    }  # fmt: skip


def named(result: Result) -> str:
    """Return the strategy of a result with its lookahead and scope."""
    return f"{result.policy} + {result.prefetch}, lookahead {result.lookahead}, {result.scope}"


def main() -> None:
    """Parse the options, tune, replay the grids and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", required=True, help="trace set")
    parser.add_argument("--device", action="append", help=f"device; repeatable (default: {', '.join(DEVICES)})")
    parser.add_argument("--budget", action="append", help="budget; repeatable (default: 10%%, 20%%)")
    parser.add_argument("--predictor", default=PREDICTOR, help=f"predictor, or none (default: {PREDICTOR})")
    parser.add_argument("--profile", default=PROFILE, help=f"usage profile, or none (default: {PROFILE})")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    predictor, profile = (None if name == "none" else name for name in (args.predictor, args.profile))
    traces, source = TraceSet(args.traces), None if predictor is None else find_source(predictor)
    console, rows = Console(width=160), []
    for device in args.device or DEVICES:
        for budget in args.budget or BUDGETS:
            options = ReplayOptions(budget=(budget,), device=device, profile=profile)
            rows.append(compared(options, traces, source, predictor))
            console.print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), highlight=False)
    table = Table(title="choice of tune, and the best strategy of the grid, on the held-out half (tok/s)")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if args.json:
        write_json(args.json, rows)
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()
