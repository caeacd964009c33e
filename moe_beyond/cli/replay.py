"""``moe-beyond replay``."""

from pathlib import Path

from moe_beyond.cli.options import add_json, add_traces, console_for, parser, write_result
from moe_beyond.cli.replay_options import (
    add_budgets,
    add_conditions,
    add_strategies,
    asked_conditions,
    asked_strategies,
    showing_progress,
)
from moe_beyond.errors import UserError
from moe_beyond.evaluation.evaluate import evaluate
from moe_beyond.evaluation.strategies import beside
from moe_beyond.report.pictures import write_pictures
from moe_beyond.report.results import results_table, unavailable_lines
from moe_beyond.traces.reader import TraceSet


def run(words: list[str]) -> None:
    """Parse the options, replay."""
    options = parser(
        "replay",
        "Replay traces through a cache under a memory budget, on a device's clock if one is named; LRU, Belady and the "
        "best fixed choice stand beside every result.",
        "moe-beyond replay --traces traces/webglm --budget 10% --strategy all --device rtx4060-laptop",
    )
    add_traces(options)
    add_budgets(options)
    add_strategies(options)
    add_conditions(options)
    options.add_argument("--plots", metavar="DIR", help="also write pictures there")
    add_json(options)
    args = options.parse_args(words[1:])
    if args.plots and Path(args.plots).exists() and not Path(args.plots).is_dir():
        raise UserError(f"--plots {args.plots}: is a file; name a folder")
    traces = TraceSet(args.traces)
    shared = asked_conditions(args, traces)
    asked = asked_strategies(args, traces, shared)
    lines = beside(asked.strategies, shared.common, traces.geometry, shared.quotas)
    with showing_progress(traces, args.split, "replaying", len(lines)) as progress:
        found = evaluate(traces, lines, args.split, asked.sources, profile=shared.profile, progress=progress)
    quiet, console = args.json == "-", console_for(args.json)
    if not quiet:
        console.print(results_table(found.results, traces.geometry))
        if asked.missing:
            console.print(unavailable_lines(asked.missing), highlight=False)
    if args.plots:
        for path in write_pictures(args.plots, traces, lines, found.results, asked.sources, shared.profile, args.split):
            if not quiet:
                console.print(f"picture: {path}", highlight=False, soft_wrap=True)
    content = {"results": [result.to_json() for result in found.results]}
    unavailable = [{"strategy": one.strategy, "why": one.why} for one in asked.missing]
    write_result(content | ({"unavailable": unavailable} if unavailable else {}), args.json)
