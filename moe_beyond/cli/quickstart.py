"""``moe-beyond quickstart``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "quickstart",
        "Record a small bundled model and fit a predictor on its routing. Then replay and run the model with its "
        "pretrained predictor, on prompts that no fit has read.",
        "moe-beyond quickstart --out demo",
    )
    parser.add_argument("--out", metavar="DIR", default="demo", help="output folder (default: demo)")
    return parser


def main(argv: list[str]) -> None:
    """Record, fit, replay and run."""
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    from moe_beyond.quickstart import quickstart  # imported here, so that wrong options are refused at once

    output.result(quickstart(args.out, output.console))
