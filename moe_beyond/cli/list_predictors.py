"""``moe-beyond list``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser
from moe_beyond.pretrained import published_figures
from moe_beyond.report.tables.pretrained import pretrained_tables


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    return parser(
        "list",
        "List the predictors that ship with this package: what each knows, and what it was measured to be worth.",
        "moe-beyond list --json -",
    )


def run(words: list[str]) -> None:
    """List the predictors."""
    output = Output(options().parse_args(words[1:]))
    found = published_figures()
    output.show(*pretrained_tables(found))
    output.result({"predictors": found})
