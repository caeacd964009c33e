"""Options that several verbs share, and where their output goes."""

import json
import sys
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from moe_beyond.files import write_json

PIPE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe; on a terminal it fits the terminal."""


def parser(verb: str, description: str, example: str) -> ArgumentParser:
    """Start the parser of a verb.

    Args:
        verb: The verb.
        description: What it does.
        example: A command line to show under ``--help``.
    """
    return ArgumentParser(
        prog=f"moe-beyond {verb}", description=f"{description} Example: {example}", allow_abbrev=False
    )


def add_json(options: ArgumentParser) -> None:
    """Add ``--json FILE``."""
    options.add_argument("--json", metavar="FILE", help="also write the result as JSON; - is standard output, alone")


def add_traces(options: ArgumentParser) -> None:
    """Add ``--traces DIR`` and ``--split S``."""
    options.add_argument("--traces", metavar="DIR", required=True, help="trace set: a folder or a URL fsspec knows")
    options.add_argument("--split", metavar="S", help="one split of the trace set; all by default")


def console_for(json_file: str | None) -> Console:
    """Return where tables and progress go: standard output, or standard error where JSON takes that."""
    console = Console(stderr=json_file == "-")
    return console if console.is_terminal else Console(stderr=json_file == "-", width=PIPE_WIDTH)


def write_result(content: Any, json_file: str | None) -> None:
    """Write the JSON a verb was asked for, if it was."""
    if json_file == "-":
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    elif json_file is not None:
        write_json(json_file, content)
