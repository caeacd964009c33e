"""``moe-beyond replay``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, add_plots, check_plots, command_parser, progress_bar
from moe_beyond.cli.replay_options import (
    UNFITTED,
    add_budgets,
    add_conditions,
    add_measured_traces,
    add_strategies,
    open_source,
    options_from_args,
)


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "replay",
        "Replay traces through a cache under a memory budget, and on a device with times. Every result is shown "
        "next to LRU, Belady and the best static choice.",
        "moe-beyond replay --traces traces/webglm --budget 10% --strategy all --device rtx4060-laptop",
    )
    add_measured_traces(parser, split_default=f"all; with a predictor, {UNFITTED}")
    add_budgets(parser)
    add_strategies(parser)
    add_conditions(parser)
    add_plots(parser)
    return parser


def main(argv: list[str]) -> None:
    """Replay traces."""
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    check_plots(args.plots)
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.evaluation.run import run_replay
    from moe_beyond.report.tables.results import results_table, unavailable_lines
    from moe_beyond.traces.reader import TraceSet

    traces = TraceSet(args.traces)
    with progress_bar("replaying", quiet=args.quiet) as progress:
        outcome = run_replay(options_from_args(args), traces, open_source(args), split=args.split, progress=progress)
    output.show(
        *outcome.measured_on.lines,
        results_table(outcome.results, outcome.geometry),
        *unavailable_lines(outcome.unavailable),
    )
    if args.plots:
        from moe_beyond.report.plots.files import replay_plots, write_plots

        replay = outcome.replay
        plots = replay_plots(
            traces, replay.strategies, outcome.results, replay.sources, replay.profile, outcome.measured_on.split
        )
        output.show(*(f"picture: {path}" for path in write_plots(args.plots, plots)))
    output.result(outcome.to_json())
