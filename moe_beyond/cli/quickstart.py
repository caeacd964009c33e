"""``moe-beyond quickstart``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "quickstart",
        "Record a small bundled mixture of experts, fit a predictor on its routing, and replay prompts it never saw.",
        "moe-beyond quickstart --out demo",
    )
    parser.add_argument("--out", metavar="DIR", default="demo", help="folder to make (default: demo)")
    return parser


def main(argv: list[str]) -> None:
    """Run the whole path."""
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    from moe_beyond.quickstart import quickstart  # heavy imports, after the options are known to be right

    output.result(quickstart(args.out, output.console).to_json())
