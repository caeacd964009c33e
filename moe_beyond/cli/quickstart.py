"""``moe-beyond quickstart``."""

from moe_beyond.cli.options import add_json, console_for, parser, write_result


def run(words: list[str]) -> None:
    """Parse the options, run the whole path."""
    options = parser(
        "quickstart",
        "Record a small bundled mixture of experts, fit a predictor on its routing, and replay prompts it never saw.",
        "moe-beyond quickstart --out demo",
    )
    options.add_argument("--out", metavar="DIR", default="demo", help="folder to make (default: demo)")
    add_json(options)
    args = options.parse_args(words[1:])
    from moe_beyond.quickstart import quickstart  # heavy imports, after the options are known to be right

    found = quickstart(args.out, console_for(args.json))
    write_result(found.to_json(), args.json)
