"""``moe-beyond tune``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, check_file, command_parser, progress_bar
from moe_beyond.cli.replay_options import (
    PREDICTOR_HELP,
    UNFITTED,
    add_budgets,
    add_conditions,
    add_measured_traces,
    add_misses,
    options_from_args,
)


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "tune",
        "Choose the best strategy of a budget: policy, prefetcher, threshold, lookahead, scope and, with several "
        "--misses, miss handling. It is chosen on one half of the conversations and judged on the other, next to LRU "
        "and Belady. LRU is chosen unless another strategy is better by more than its spread. `run --config FILE` and "
        "`replay --config FILE` use the choice.",
        "moe-beyond tune --traces traces/webglm --device rtx4060-laptop --budget 10% --out tuned.yaml",
    )
    add_measured_traces(parser, split_default=f"all; with a predictor, {UNFITTED}")
    add_budgets(parser)
    parser.add_argument(
        "--for",
        metavar="AIM",
        help="figure to improve: tokens per second on --device, hits, or bytes (default: tokens with --device, hits "
        "without)",
    )
    parser.add_argument(
        "--predictor",
        metavar="PREDICTOR",
        help=f"predictor of prefetchers and policies: {PREDICTOR_HELP} (default: none)",
    )
    add_misses(parser)
    add_conditions(parser, scope_default=None)
    parser.add_argument("--out", metavar="FILE", help="strategy file to write, in YAML (default: none)")
    return parser


def main(argv: list[str]) -> None:
    """Choose a strategy.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    check_file("--out", args.out)
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.evaluation.strategy_file import write_strategy
    from moe_beyond.evaluation.tuning import DRAWS, resolve_aim, run_tuning
    from moe_beyond.report.tables.tuning import tuning_tables
    from moe_beyond.traces.reader import TraceSet

    resolve_aim(args["for"], args.device)
    traces, source = TraceSet(args.traces), None
    if args.predictor is not None:
        from moe_beyond.evaluation.checkpoints import find_source  # imports torch, which other tunings do not need

        source = find_source(args.predictor)
    with progress_bar("tuning", quiet=args.quiet) as progress:
        report = run_tuning(
            options_from_args(args), traces, source, aim=args["for"], scope=args.scope, predictor=args.predictor,
            split=args.split, progress=lambda tried: progress(0, None, f"{tried:,} strategies"),
        )  # fmt: skip
    if args.out is not None:
        write_strategy(args.out, report.choice, ("written by moe-beyond tune", *report.sentences))
    output.show(
        *report.measured_on.lines, str(report.halves), *tuning_tables(report, DRAWS), *report.sentences,
        *([] if args.out is None else [f"strategy file: {args.out}"]),
    )  # fmt: skip
    output.result(report.to_json())
