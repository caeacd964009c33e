"""``moe-beyond report``."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser, progress_bar
from moe_beyond.cli.replay_options import BUDGET_HELP, DEVICE_HELP, PREDICTOR_HELP, add_measured_traces
from moe_beyond.errors import UserError

DEFAULT_BUDGETS = "5, 10, 15, 20, 30, 40, 50 and 60% of all experts"
DEFAULT_DEVICES = "rtx4060-laptop, rtx4090, jetson-agx-orin"
"""Defaults of the page in words: `moe_beyond.report.html.strategies` has them, and imports what help does not need."""


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "report",
        "Write a page about a predictor: its training data, its figures on a trace set, and its replay under budgets "
        "and on devices. The page is one HTML file that makes no network requests.",
        "moe-beyond report runs/predictor/version_0 --traces traces/webglm --out report.html",
    )
    parser.add_argument("predictor", metavar="RUN_OR_PREDICTOR", help=PREDICTOR_HELP)
    add_measured_traces(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="HTML file to write")
    parser.add_argument(
        "--budget", action="append", metavar="BUDGET", help=f"{BUDGET_HELP} (default: {DEFAULT_BUDGETS})"
    )
    parser.add_argument(
        "--device", action="append", metavar="DEVICE", help=f"{DEVICE_HELP}; repeatable (default: {DEFAULT_DEVICES})"
    )
    parser.add_argument(
        "--warmup-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens at the start of each sequence that replays do not count (default: 0)",
    )
    return parser


def main(argv: list[str]) -> None:
    """Evaluate a predictor, and write the page."""
    args = build_parser().parse_args(argv[1:])
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file, {Path(args.out) / 'report.html'} for example")
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.report.html.report import write_report
    from moe_beyond.traces.reader import TraceSet

    output = Output(args)
    with progress_bar(f"replaying {args.predictor}", quiet=args.quiet) as progress:
        outcome = write_report(
            args.out,
            args.predictor,
            TraceSet(args.traces),
            split=args.split,
            budgets=args.budget or (),
            devices=args.device or (),
            warmup_tokens=args.warmup_tokens,
            progress=progress,
        )
    output.show(*outcome.measured_on.lines, f"page: {args.out}")
    output.result(outcome.to_json())
