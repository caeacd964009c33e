"""``moe-beyond quickstart``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "quickstart",
        "Record a small bundled model, fit a predictor on its routing, and replay prompts that neither was fitted on.",
        "moe-beyond quickstart --out demo",
    )
    known.add_argument("--out", metavar="DIR", default="demo", help="output folder (default: demo)")
    return known


def run(words: list[str]) -> None:
    """Record, fit and replay."""
    args = options().parse_args(words[1:])
    output = Output(args)
    from moe_beyond.quickstart import quickstart  # imported here, so that wrong options are refused at once

    output.result(quickstart(args.out, output.console).to_json())
