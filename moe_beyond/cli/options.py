"""Options that all verbs share, and where their output goes."""

import json
import logging
import os
import sys
from argparse import Action
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console, RenderableType
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from moe_beyond.cli.slips import OneLineErrors
from moe_beyond.errors import UserError
from moe_beyond.files import write_json

TRACES_HELP = "trace set: a folder, hf:ORG/REPO, or a URL fsspec knows"
SPLIT_HELP = "split of the trace set (default: all; with a predictor, one that it was not fitted on, if there is one)"
PIPE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe; on a terminal it fits the terminal."""

EXAMPLE = "example:"


class ExampleAsWritten(DefaultHelpFormatter):
    """Help whose example stays as it is written, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLE) else super()._fill_text(text, width, indent)


class _Help(ExampleAsWritten):
    """Help without types and defaults, which the options' own words tell."""

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""


def parser(verb: str, description: str, example: str) -> ArgumentParser:
    """Start the parser of a verb, with the options that all of them have.

    Args:
        verb: The verb.
        description: What it does.
        example: A command line to show under ``--help``.
    """
    options = OneLineErrors(
        prog=f"moe-beyond {verb}",
        description=description,
        epilog=example_text(example),
        allow_abbrev=False,
        formatter_class=_Help,
    )
    options.verb, options.example = verb, example
    add_output(options)
    return options


def example_text(example: str) -> str:
    """Return what stands under an ``--help``."""
    return f"{EXAMPLE}\n  {example}"


def add_output(options: ArgumentParser) -> None:
    """Add ``--json FILE`` and ``--quiet``, which `Output` reads."""
    options.add_argument("--json", metavar="FILE", help="also write the result as JSON; - is standard output, alone")
    options.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_traces(options: ArgumentParser) -> None:
    """Add ``--traces DIR`` and ``--split S``."""
    options.add_argument("--traces", metavar="DIR", required=True, help=TRACES_HELP)
    options.add_argument("--split", metavar="S", help=SPLIT_HELP)


def add_plots(options: ArgumentParser) -> None:
    """Add ``--plots DIR``."""
    options.add_argument("--plots", metavar="DIR", help="also write pictures there")


def check_plots(folder: str | None) -> None:
    """Check, before anything takes long, that pictures have somewhere to go.

    Raises:
        UserError: ``--plots`` names a file.
    """
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"--plots {folder}: is a file; name a folder")


def check_json(path: str | None) -> None:
    """Check, before anything takes long, that the JSON has somewhere to go.

    Raises:
        UserError: ``--json`` names a folder, or a file below a file or in a folder that cannot be written.
    """
    if path in (None, "-"):
        return
    if not path:
        raise UserError("--json: the name of the file is empty; name a file, or - for standard output")
    file = Path(path)
    if file.is_dir():
        raise UserError(f"--json {path}: is a folder; name a file")
    above = next(folder for folder in (*file.parents, Path()) if folder.exists())
    if not above.is_dir():
        raise UserError(f"--json {path}: {above} is a file, not a folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--json {path}: {above} cannot be written to; name another place")


class Output:
    """Where a verb's tables, lines and result go.

    Standard output has the tables, unless ``--json -`` takes it for the JSON, alone; ``--quiet`` prints nothing.

    Args:
        args: The parsed options.

    Raises:
        UserError: ``--json`` names no file that could be written.
    """

    def __init__(self, args: Namespace) -> None:
        check_json(args.json)
        self._json: str | None = args.json
        self.quiet: bool = args.quiet or args.json == "-"
        logging.getLogger("moe_beyond").setLevel(logging.ERROR if args.quiet else logging.WARNING)
        console = Console(quiet=self.quiet)
        self.console = console if console.is_terminal else Console(quiet=self.quiet, width=PIPE_WIDTH)

    def show(self, *parts: RenderableType) -> None:
        """Print tables and lines; a line is not broken, nor taken for markup."""
        for part in parts:
            if isinstance(part, str):
                self.console.print(part, highlight=False, markup=False, soft_wrap=True)
            else:
                self.console.print(part)

    def result(self, content: Any) -> None:
        """Write the JSON that was asked for, if it was."""
        if self._json == "-":
            sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        elif self._json is not None:
            write_json(self._json, content)


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar on standard error, and only on a terminal.

    Yields:
        What to call with how much is done, of how much, and perhaps what to say beside.
    """
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(), TextColumn("{task.fields[beside]}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, beside="")
        yield lambda done, total, beside="": bar.update(task, completed=done, total=total, beside=beside)
