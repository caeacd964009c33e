"""``moe-beyond quickstart``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "quickstart",
        "Record a small bundled mixture of experts, fit a predictor on its routing, and replay prompts it never saw.",
        "moe-beyond quickstart --out demo",
    )
    known.add_argument("--out", metavar="DIR", default="demo", help="folder to make (default: demo)")
    return known


def run(words: list[str]) -> None:
    """Run the whole path."""
    args = options().parse_args(words[1:])
    output = Output(args)
    from moe_beyond.quickstart import quickstart  # heavy imports, after the options are known to be right

    output.result(quickstart(args.out, output.console).to_json())
