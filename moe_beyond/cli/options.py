"""Options that several verbs share, and where their output goes."""

import json
import sys
from argparse import Action
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from rich.console import Console

from moe_beyond.errors import UserError
from moe_beyond.files import write_json

TRACES_HELP = "trace set: a folder, hf:ORG/REPO, or a URL fsspec knows"
PIPE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe; on a terminal it fits the terminal."""


class OneLineErrors(ArgumentParser):
    """A parser whose complaints are one line, as all of the command's are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` instead of printing the usage."""
        program = self.prog.replace(" [options]", "")
        told = message.split("Given value type")[0]  # what follows is the whole configuration
        raise UserError(f"{' '.join(told.split())}; {program} --help tells the options") from ex


class _Help(DefaultHelpFormatter):
    """Help without types and defaults, which the options' own words tell."""

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""


def parser(verb: str, description: str, example: str) -> ArgumentParser:
    """Start the parser of a verb.

    Args:
        verb: The verb.
        description: What it does.
        example: A command line to show under ``--help``.
    """
    return OneLineErrors(
        prog=f"moe-beyond {verb}",
        description=f"{description} Example: {example}",
        allow_abbrev=False,
        formatter_class=_Help,
    )


def add_json(options: ArgumentParser) -> None:
    """Add ``--json FILE``."""
    options.add_argument("--json", metavar="FILE", help="also write the result as JSON; - is standard output, alone")


def add_traces(options: ArgumentParser) -> None:
    """Add ``--traces DIR`` and ``--split S``."""
    options.add_argument("--traces", metavar="DIR", required=True, help=TRACES_HELP)
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
