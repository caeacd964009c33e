"""``--config FILE`` of ``run`` and ``replay``: a strategy file, whose values options of the command line replace."""

import os
from collections.abc import Collection, Sequence

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.evaluation.strategy_file import read_strategy
from moe_beyond.safe_text import shown

FOLDERS = ("predictor", "profile")
"""Options that name a folder, a pretrained predictor or a repository of the Hub."""


def add_config(parser: ArgumentParser) -> None:
    """Add ``--config``."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="strategy file of `moe-beyond tune --out`: budget, policy, prefetcher, lookahead, scope, predictor and "
        "profile; options of the command line take precedence (default: none)",
    )


def apply_config(args: Namespace, given: Sequence[str], repeated: Collection[str] = ()) -> None:
    """Set the options of a strategy file that the command line did not give.

    Args:
        args: Parsed arguments with ``config``.
        given: Arguments of the command line.
        repeated: Names of options that are lists (default: none).

    Raises:
        UserError: The file cannot be read, or names a folder that does not exist.
    """
    if args.config is None:
        return
    typed = given_options(given)
    for name, value in read_strategy(args.config).options().items():
        if name not in typed:
            if name in FOLDERS and "/" in str(value) and not (is_hub_name(str(value)) or os.path.isdir(value)):
                raise UserError(f"--config {args.config}: {name}: {shown(value)} is no folder; give --{name}")
            args[name] = [value] if name in repeated else value


def given_options(given: Sequence[str]) -> set[str]:
    """Return the names of the options of a command line, such as ``prefill_chunk``."""
    return {word.partition("=")[0][2:].replace("-", "_") for word in given if word.startswith("--")}
