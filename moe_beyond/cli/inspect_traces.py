"""``moe-beyond inspect``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import TRACES_HELP, Output, add_plots, check_plots, parser, progress_bar
from moe_beyond.report.inspection import inspection_tables
from moe_beyond.traces.contrast import check_comparable, contrast
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.statistics import summarize


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
    add_plots(known)
    return known


def run(words: list[str]) -> None:
    """Describe the set."""
    args = options().parse_args(words[1:])
    output = Output(args)
    check_plots(args.plots)
    traces = TraceSet(args.traces)
    other = None if args.contrast is None else TraceSet(args.contrast)
    if other is not None:
        check_comparable(traces, other)
        other.shards(args.split)  # a split that is not there is said before all is counted
    with progress_bar("counting", quiet=output.quiet) as progress:
        summary = summarize(traces, args.split, progress=progress)
    if other is not None:
        summary["contrast"] = contrast(traces, other, args.split)
    output.show(*inspection_tables(summary))
    if args.plots:
        from moe_beyond.report.inspection_plots import inspection_figures
        from moe_beyond.report.pictures import write_pictures

        drawn = inspection_figures(summary)
        output.show(*(f"picture: {path}" for path in write_pictures(args.plots, drawn)))
    output.result(summary)
