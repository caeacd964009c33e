"""``moe-beyond plan``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser, progress_bar
from moe_beyond.cli.replay_options import (
    UNFITTED,
    add_budgets,
    add_conditions,
    add_measured_traces,
    add_strategies,
    open_source,
    options_from_args,
)
from moe_beyond.errors import UserError


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "plan",
        "Find the smallest budget at which each strategy reaches a target, or the bottleneck if none does, and the "
        "experts to pin. On a device, budgets stay within its memory, less its other weights and a reserve of an "
        "eighth. The budget is the smallest one if a larger budget is never worse; with lfu_in_cache it can be worse.",
        "moe-beyond plan --traces traces/webglm --device rtx4060-laptop --target 10tok/s --strategy all",
    )
    add_measured_traces(parser, split_default=f"all; with a predictor, {UNFITTED}")
    parser.add_argument(
        "--target",
        metavar="TARGET",
        help="target: 90% for a hit rate, or 10tok/s on --device (default: none, only --pins)",
    )
    parser.add_argument(
        "--pins", metavar="FILE", help="JSON file for the experts to pin, which export pins reads (default: none)"
    )
    add_budgets(parser, "memory budget for --pins")
    add_strategies(parser)
    add_conditions(parser)
    return parser


def main(argv: list[str]) -> None:
    """Size budgets, and choose the experts to pin."""
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    if args.target is None and args.pins is None:
        raise UserError("plan: nothing to do; give --target TARGET to reach, or --pins FILE to write")
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.evaluation.pins import choose_pins, write_pins
    from moe_beyond.evaluation.sizing import check_target, parse_target, run_sizing
    from moe_beyond.report.tables.results import unavailable_lines
    from moe_beyond.report.tables.sizing import sizing_table
    from moe_beyond.traces.reader import TraceSet

    replay_options = options_from_args(args)
    target = None if args.target is None else parse_target(args.target)
    if target is not None:
        check_target(replay_options, target)
    traces = TraceSet(args.traces)
    pins = None if args.pins is None else choose_pins(replay_options, traces, split=args.split)
    report = None
    if target is not None:
        source = open_source(args)
        with progress_bar("planning", quiet=args.quiet) as progress:
            report = run_sizing(replay_options, traces, target, source, split=args.split, progress=progress)
    if pins is not None:
        write_pins(args.pins, pins)
        output.show(f"pins: {args.pins}")
    if report is not None:
        output.show(
            *report.measured_on.lines,
            sizing_table(report.sizings, report.target, traces.geometry, report.bytes_per_expert),
            *unavailable_lines(report.unavailable),
        )
        output.result(report.to_json())
