"""``moe-beyond inspect``."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import (
    TRACES_HELP,
    Output,
    add_plots,
    add_workers,
    check_plots,
    check_workers,
    command_parser,
    progress_bar,
)
from moe_beyond.errors import UserError
from moe_beyond.files import write_json


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "inspect",
        "Describe a trace set layer by layer: popularity and skew of experts, reuse distances, "
        "dependence between layers, "
        "gate weights, prefill and decode; and the experts that another trace set uses more or less.",
        "moe-beyond inspect traces/puffin --contrast traces/webglm --plots plots",
    )
    parser.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    parser.add_argument("--split", metavar="SPLIT", help="split of the trace set, and of OTHER (default: all)")
    parser.add_argument(
        "--contrast",
        metavar="OTHER",
        help="trace set of the same model to compare with, by selection rates (default: none)",
    )
    parser.add_argument(
        "--steer",
        metavar="FILE",
        help="write a steering file for `moe-beyond collect --steer`: it forces on the N experts that DIR uses most in "
        "excess of OTHER (--on), and off the N that it uses least (--off) (default: no file)",
    )
    parser.add_argument("--on", type=int, default=0, metavar="N", help="number of experts to force on (default: 0)")
    parser.add_argument("--off", type=int, default=0, metavar="N", help="number of experts to force off (default: 0)")
    add_workers(parser)
    add_plots(parser)
    return parser


def main(argv: list[str]) -> None:
    """Describe a trace set.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    from moe_beyond.report.tables.inspection import inspection_tables
    from moe_beyond.traces.analysis.contrast import check_comparable, contrast_traces, most_different_experts
    from moe_beyond.traces.analysis.statistics import summarize
    from moe_beyond.traces.reader import TraceSet

    output = Output(args)
    check_plots(args.plots)
    check_workers(args.workers)
    for name in ("on", "off"):
        if args[name] < 0:
            raise UserError(f"--{name} {args[name]} is less than 0")
    if (args.steer is None) == bool(args.on or args.off) or (args.steer and args.contrast is None):
        raise UserError("--steer FILE goes with --contrast OTHER and with --on N, --off N or both")
    if args.steer and Path(args.steer).is_dir():
        raise UserError(f"--steer {args.steer}: is a folder; name a file")
    traces = TraceSet(args.traces)
    other = None if args.contrast is None else TraceSet(args.contrast)
    if other is not None:
        check_comparable(traces, other)
        other.shards(args.split)  # a missing split is reported before the counting
    with progress_bar("counting", quiet=output.quiet) as progress:
        summary = summarize(traces, args.split, progress=progress, workers=args.workers)
    difference = None if other is None else contrast_traces(traces, other, args.split)
    if args.steer and difference is not None:
        write_json(args.steer, most_different_experts(difference, traces.geometry, args.on, args.off).to_json())
    output.show(*inspection_tables(summary, difference))
    if args.steer:
        output.show(f"steering: {args.steer}")
    if args.plots:
        from moe_beyond.report.plots.files import write_plots
        from moe_beyond.report.plots.inspection import inspection_plots

        plots = inspection_plots(summary, difference)
        output.show(*(f"picture: {path}" for path in write_plots(args.plots, plots)))
    output.result(summary.to_json() | ({} if difference is None else {"contrast": difference.to_json()}))
