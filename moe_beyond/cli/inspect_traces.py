"""``moe-beyond inspect``."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import TRACES_HELP, Output, add_plots, check_plots, parser, progress_bar
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.report.tables.inspection import inspection_tables
from moe_beyond.traces.analysis.contrast import check_comparable, contrast_traces, most_different_experts
from moe_beyond.traces.analysis.statistics import summarize
from moe_beyond.traces.reader import TraceSet


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "inspect",
        "Describe a trace set, layer by layer: popularity and skew, how soon experts are used again, what a layer "
        "tells of the next, gate weights, prefill against decode; and which experts another set uses more or less.",
        "moe-beyond inspect traces/puffin --contrast traces/webglm --plots plots",
    )
    known.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    known.add_argument("--split", metavar="S", help="one split of the trace set, and of OTHER; all by default")
    known.add_argument(
        "--contrast", metavar="OTHER", help="another trace set of the same model: differences of activation rates"
    )
    known.add_argument(
        "--steer",
        metavar="FILE",
        help="write what `moe-beyond collect --steer FILE` reads: the --on N experts that DIR uses most beyond OTHER, "
        "and the --off N that it uses least",
    )
    known.add_argument("--on", type=int, default=0, metavar="N", help="experts to force on (0)")
    known.add_argument("--off", type=int, default=0, metavar="N", help="experts to force off (0)")
    add_plots(known)
    return known


def run(words: list[str]) -> None:
    """Describe the set."""
    args = options().parse_args(words[1:])
    output = Output(args)
    check_plots(args.plots)
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
        other.shards(args.split)  # a split that is not there is said before all is counted
    with progress_bar("counting", quiet=output.quiet) as progress:
        summary = summarize(traces, args.split, progress=progress)
    difference = None if other is None else contrast_traces(traces, other, args.split)
    if args.steer and difference is not None:
        write_json(args.steer, most_different_experts(difference, traces.geometry, args.on, args.off).to_json())
    output.show(*inspection_tables(summary, difference))
    if args.steer:
        output.show(f"steering: {args.steer}")
    if args.plots:
        from moe_beyond.report.plots.files import write_figures
        from moe_beyond.report.plots.inspection import inspection_figures

        drawn = inspection_figures(summary, difference)
        output.show(*(f"picture: {path}" for path in write_figures(args.plots, drawn)))
    output.result(summary.to_json() | ({} if difference is None else {"contrast": difference.to_json()}))
