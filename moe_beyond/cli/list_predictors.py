"""``moe-beyond list``."""

from moe_beyond.cli.options import add_json, console_for, parser, write_result
from moe_beyond.published import published_figures
from moe_beyond.report.published import published_tables


def run(words: list[str]) -> None:
    """Parse the options, list the predictors."""
    options = parser(
        "list",
        "List the predictors that ship with this package: what each knows, and what it was measured to be worth.",
        "moe-beyond list --json -",
    )
    add_json(options)
    args = options.parse_args(words[1:])
    found = published_figures()
    if args.json != "-":
        console_for(args.json).print(*published_tables(found))
    write_result({"predictors": found}, args.json)
