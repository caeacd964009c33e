"""``moe-beyond list``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser
from moe_beyond.pretrained import CHECKPOINTS_VARIABLE, pretrained_figures


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    return command_parser(
        "list",
        "List the pretrained predictors: size, lookaheads, and the recall and hit rates that were measured.",
        "moe-beyond list --json -",
    )


def main(argv: list[str]) -> None:
    """List the predictors.

    Args:
        argv: The command and its options.
    """
    output = Output(build_parser().parse_args(argv[1:]))
    from moe_beyond.report.tables.pretrained import pretrained_tables

    predictors = pretrained_figures()
    output.show(*pretrained_tables(predictors))
    missing = [row["name"] for row in predictors if not row["installed"]]
    if missing:
        output.show(f"not installed: {', '.join(missing)}: set {CHECKPOINTS_VARIABLE} to checkpoints/ of a clone")
    output.result({"predictors": predictors})
