"""``moe-beyond inspect``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import TRACES_HELP, Output, parser
from moe_beyond.report.inspection import inspection_tables
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.statistics import summarize


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "inspect",
        "Describe a trace set: counts, geometry, popularity and skew by layer, token-to-token reuse.",
        "moe-beyond inspect traces/puffin --json -",
    )
    known.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    return known


def run(words: list[str]) -> None:
    """Describe the set."""
    args = options().parse_args(words[1:])
    output = Output(args)
    summary = summarize(TraceSet(args.traces))
    output.show(*inspection_tables(summary))
    output.result(summary)
