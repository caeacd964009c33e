"""``moe-beyond inspect``."""

from moe_beyond.cli.options import TRACES_HELP, add_json, console_for, parser, write_result
from moe_beyond.report.inspection import inspection_tables
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.statistics import summarize


def run(words: list[str]) -> None:
    """Parse the options, describe the set."""
    options = parser(
        "inspect",
        "Describe a trace set: counts, geometry, popularity and skew by layer, token-to-token reuse.",
        "moe-beyond inspect traces/puffin --json -",
    )
    options.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    add_json(options)
    args = options.parse_args(words[1:])
    summary = summarize(TraceSet(args.traces))
    if args.json != "-":
        console = console_for(args.json)
        for table in inspection_tables(summary):
            console.print(table)
    write_result(summary, args.json)
