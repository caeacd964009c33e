"""Options that all commands share, and the output of a command."""

import json
import logging
import os
import sys
from argparse import Action
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from moe_beyond.cli.parser import CommandParser
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.safe_text import printable_lines
from moe_beyond.urls import without_secrets

if TYPE_CHECKING:
    from rich.console import RenderableType

MODEL_HELP = (
    "model: a folder, ORG/REPO on the Hugging Face Hub, or small-moe, which ships with this package; code of the "
    "model's repository is never run"
)
REVISION_HELP = "branch, tag or commit on the Hub, for all files of the model (default: main)"
TRACES_HELP = "trace set: a folder, hf:ORG/REPO, or a URL that fsspec reads"
PIPE_WIDTH = 120
"""Columns of a table in a file or a pipe; on a terminal, a table fits the terminal."""
EXAMPLE = "example:"
"""First line of the example at the end of a help text."""


class ExampleAsWritten(DefaultHelpFormatter):
    """Help format that keeps the line breaks of the example."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLE) else super()._fill_text(text, width, indent)


class _HelpFormat(ExampleAsWritten):
    """Help format without types and defaults, which the help texts state."""

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""


def command_parser(command: str, description: str, example: str) -> CommandParser:
    """Create the parser of a command, with the options that all commands have.

    Args:
        command: Name of the command.
        description: Purpose of the command.
        example: Example command line, shown at the end of ``--help``.
    """
    parser = CommandParser(
        prog=f"moe-beyond {command}",
        description=description,
        epilog=example_text(example),
        allow_abbrev=False,
        formatter_class=_HelpFormat,
    )
    parser.command, parser.example = command, example
    add_output(parser)
    return parser


def example_text(example: str) -> str:
    """Return the text at the end of ``--help``."""
    return f"{EXAMPLE}\n  {example}"


def add_output(parser: ArgumentParser) -> None:
    """Add ``--json FILE`` and ``--quiet``, which `Output` reads."""
    parser.add_argument(
        "--json", metavar="FILE", help="file for the result as JSON; - prints only the JSON (default: no JSON)"
    )
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def add_plots(parser: ArgumentParser) -> None:
    """Add ``--plots DIR``."""
    parser.add_argument("--plots", metavar="DIR", help="folder for plots as PNG files (default: no plots)")


def check_plots(folder: str | None) -> None:
    """Refuse a folder for plots that cannot be a folder, before anything takes long.

    Raises:
        UserError: ``--plots`` names a file.
    """
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"--plots {folder}: is a file; name a folder")


def check_json(path: str | None) -> None:
    """Refuse a file for the JSON that cannot be written, before anything takes long.

    Args:
        path: Name of the file; None for none, ``-`` for standard output.

    Raises:
        UserError: ``--json`` names a folder, or a file below a file or in a folder that cannot be written to.
    """
    if path == "":
        raise UserError("--json: the name of the file is empty; name a file, or - for standard output")
    if path != "-":
        check_file("--json", path)


def check_file(option: str, path: str | None) -> None:
    """Refuse a file that cannot be written, before anything takes long.

    Args:
        option: Option that names the file.
        path: Name of the file; None for none.

    Raises:
        UserError: The name is empty or that of a folder, or the file is below a file or in a folder that cannot be
            written to.
    """
    if path is None:
        return
    if not path:
        raise UserError(f"{option}: the name of the file is empty; name a file")
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    ancestor = next(folder for folder in (*file.parents, Path()) if folder.exists())
    if not ancestor.is_dir():
        raise UserError(f"{option} {path}: {ancestor} is a file, not a folder; name another place")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {ancestor} cannot be written to; name another place")


class Output:
    """Destination of a command's tables, lines and JSON.

    Tables and lines go to standard output. With ``--json -`` only the JSON does; with ``--quiet`` nothing does.

    Args:
        args: Parsed options of the command.

    Raises:
        UserError: ``--json`` names a file that cannot be written.
    """

    def __init__(self, args: Namespace) -> None:
        from rich.console import Console

        check_json(args.json)
        self._json: str | None = args.json
        self.quiet: bool = args.quiet or args.json == "-"
        logging.getLogger("moe_beyond").setLevel(logging.ERROR if args.quiet else logging.WARNING)
        console = Console(quiet=self.quiet)
        self.console = console if console.is_terminal else Console(quiet=self.quiet, width=PIPE_WIDTH)

    def show(self, *parts: "RenderableType") -> None:
        """Print tables and lines; a line is neither broken nor read as markup, and controls no terminal."""
        for part in parts:
            if isinstance(part, str):
                self.console.print(
                    printable_lines(without_secrets(part)), highlight=False, markup=False, soft_wrap=True
                )
            else:
                self.console.print(part)

    def result(self, content: Any) -> None:
        """Write the JSON if ``--json`` is given."""
        if self._json == "-":
            sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        elif self._json is not None:
            write_json(self._json, content)


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error if that is a terminal.

    Args:
        label: Text before the bar.
        quiet: Show nothing (default: False).

    Yields:
        Function of the work done, the total work and, optionally, a text after the bar (``suffix``).
    """
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(), TextColumn("{task.fields[suffix]}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(label, total=None, suffix="")
        yield lambda done, total, suffix="": bar.update(task, completed=done, total=total, suffix=suffix)


def add_workers(parser: ArgumentParser) -> None:
    """Add ``--workers N``."""
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the shards; the result is the same (default: 1)",
    )


def check_workers(workers: int) -> None:
    """Check the number of processes.

    Raises:
        UserError: It is less than 1, or torchrun started the command several times.
    """
    if workers < 1:
        raise UserError(f"--workers: must be at least 1 (got {workers}); give the number of processes")
    ranks = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and ranks != "1":
        raise UserError(f"torchrun: starts this command {ranks} times; start it once, with --workers {ranks}")
