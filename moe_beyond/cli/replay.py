"""``moe-beyond replay``."""

from typing import Any

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, add_plots, add_traces, check_plots, command_parser
from moe_beyond.cli.replay_options import (
    add_budgets,
    add_conditions,
    add_strategies,
    asked_source,
    request_of,
    showing_progress,
)
from moe_beyond.evaluation.options import asked_conditions, asked_strategies, text_to_measure
from moe_beyond.evaluation.run import evaluate
from moe_beyond.evaluation.strategies import beside
from moe_beyond.report.plots.files import pictures, write_pictures
from moe_beyond.report.tables.results import results_table, unavailable_lines
from moe_beyond.traces.reader import TraceSet


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "replay",
        "Replay traces through a cache under a memory budget, on a device's clock if one is named; LRU, Belady and the "
        "best fixed choice stand beside every result.",
        "moe-beyond replay --traces traces/webglm --budget 10% --strategy all --device rtx4060-laptop",
    )
    add_traces(parser)
    add_budgets(parser)
    add_strategies(parser)
    add_conditions(parser)
    add_plots(parser)
    return parser


def main(argv: list[str]) -> None:
    """Replay."""
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    check_plots(args.plots)
    traces = TraceSet(args.traces)
    request = request_of(args)
    shared = asked_conditions(request, traces)
    asked = asked_strategies(request, traces, shared, asked_source(args))
    text = text_to_measure(traces, args.split, shared, asked.sources)
    lines = beside(asked.strategies, shared.common, traces.geometry, shared.quotas)
    with showing_progress(traces, text.split, "replaying", len(lines), quiet=args.quiet) as progress:
        found = evaluate(traces, lines, text.split, asked.sources, profile=shared.profile, progress=progress)
    output.show(*text.lines, results_table(found.results, traces.geometry), *unavailable_lines(asked.missing))
    if args.plots:
        drawn = pictures(traces, lines, found.results, asked.sources, shared.profile, text.split)
        output.show(*(f"picture: {path}" for path in write_pictures(args.plots, drawn)))
    content: dict[str, Any] = {"measured_on": text.to_json(), "results": [result.to_json() for result in found.results]}
    unavailable = [{"strategy": one.strategy, "why": one.why} for one in asked.missing]
    output.result(content | ({"unavailable": unavailable} if unavailable else {}))
