"""The program ``moe-beyond``: finds the command, runs it, and turns a user's mistake into one line and exit code 2."""

import atexit
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moe_beyond.cli.limits import exceeded_limit
from moe_beyond.errors import UserError, unknown
from moe_beyond.messages import print_error
from moe_beyond.safe_text import brief
from moe_beyond.unfinished import temporary_files
from moe_beyond.version import __version__

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Start here": {
        "quickstart": ("quickstart", "record, fit, replay and run a small bundled model in under three minutes"),
    },
    "Traces": {
        "collect": ("collect", "run a mixture-of-experts model over prompts and record its routing"),
        "import": ("import_traces", "convert another tool's recording into a trace set"),
        "export": ("export_traces", "write a trace set or the experts to pin for another tool"),
        "inspect": ("inspect_traces", "describe a trace set, or compare two: popularity, locality, dependence"),
    },
    "Predictors": {
        "fit": ("lightning_commands", "fit a predictor from configuration files and options"),
        "test": ("lightning_commands", "test a checkpoint"),
        "predict": ("lightning_commands", "write a checkpoint's scores for every sequence"),
        "package": ("package", "convert a checkpoint or a run into a predictor folder"),
        "push": ("push", "upload a predictor or a trace set to the Hugging Face Hub"),
        "list": ("list_predictors", "list the pretrained predictors with their figures"),
    },
    "Results": {
        "evaluate": ("evaluate", "measure a predictor's recall and its benefit under a budget"),
        "replay": ("replay", "replay traces through a cache under a budget"),
        "report": ("report", "write an HTML page about a predictor or a run"),
        "devices": ("devices", "list the device presets with their numbers and sources"),
        "probe": ("probe", "measure this machine's interconnect, disk, memory and computing"),
        "plan": ("plan", "find the smallest budget for a target, and the experts to pin"),
        "tune": ("tune", "choose the best strategy of a budget, on recorded conversations"),
        "validate": ("validate", "compare a recording with its replay, or validate a checkpoint"),
    },
    "Models": {
        "run": ("run", "run a model under a memory budget for its experts, and generate text"),
        "pack": ("pack", "copy a model with contiguous experts, for fast reads from the disk"),
    },
    "Shell": {
        "completion": ("completion", "print a script that completes commands, options and names"),
    },
}
"""Group -> command -> (module of this folder, summary). A module is imported only if its command runs."""
SYNONYMS = {
    "train": "fit",
    "eval": "evaluate",
    "record": "collect",
    "simulate": "replay",
    "upload": "push",
    "ls": "list",
}
"""Commands of other tools -> the commands that do the same here."""
INTERRUPTED = "moe-beyond: interrupted; run the same command again"
COMMANDS = {command: entry for group in GROUPS.values() for command, entry in group.items()}


def usage() -> str:
    """Return the text of ``moe-beyond --help``."""
    lines = [
        "usage: moe-beyond COMMAND [OPTIONS]",
        "",
        "Record, predict and replay mixture-of-experts routing under a memory budget.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {command:<11} {summary}" for command, (_, summary) in commands.items())]
    lines += ["", "moe-beyond help COMMAND lists a command's options. moe-beyond --version prints the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name (default: the arguments of this process).

    Returns:
        Exit code: 0, or 2 if an argument or a file of the user is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # "passive" lets idle threads of torch sleep at a barrier. Next to other busy processes, spinning threads take the
    # cores that the last thread waits for: a training step on two shared cores was ten times slower. OpenMP reads the
    # variable when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        if arguments[0:1] == ["help"]:
            arguments = [*arguments[1:2], "--help"]
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage(), file=sys.stdout if arguments else sys.stderr)
            return 0 if arguments else 2
        command = arguments[0]
        if command in ("--version", "-V", "version"):
            print(f"moe-beyond {__version__}")
            return 0
        if command in SYNONYMS:
            raise UserError(f"unknown command {command!r}; did you mean {SYNONYMS[command]!r}?")
        if command not in COMMANDS:
            raise unknown("command", command, COMMANDS)
        importlib.import_module(f"moe_beyond.cli.{COMMANDS[command][0]}").main(arguments)
    except UserError as error:
        print_error(error)
        return 2
    except SystemExit as end:  # argument parsers exit after their own message
        if is_interrupt(end):
            print(INTERRUPTED, file=sys.stderr)
            return 130
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except Exception as error:
        line = exceeded_limit(error)
        if line is None and isinstance(error, OSError):  # a path that cannot be read or written
            location = f"{error.filename}: " if error.filename else ""
            line = f"{location}{brief(error.strerror or error)}"
        if line is None:
            raise
        print_error(line)
        return 2
    return 0


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception is Ctrl-C, or was raised while a library handled it; Lightning exits with code 1."""
    if isinstance(error, SystemExit) and error.code != 1:
        return False
    context: BaseException | None = error
    while context is not None and not isinstance(context, KeyboardInterrupt):
        context = context.__context__
    return context is not None


def _open_closed_streams() -> None:
    """Give a standard stream that the shell closed, as ``>&-`` does, the null device.

    Python has None in its place, and the next file that opens would get its descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))


def console() -> NoReturn:
    """Run this process's command line, and end the process without C++ destructors.

    Arrow and torch keep native threads that Python cannot join. If such a thread still runs while static objects are
    destroyed, the process aborts after its work is done: its exit code is 134 instead of 0 or 2.
    """
    _open_closed_streams()
    with temporary_files():
        code = main()
        # The work is done or undone. Ctrl-C ends the wait for other threads, but leaves no temporary file.
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001  (as an exit does)
        except KeyboardInterrupt:
            pass
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        atexit._run_exitfuncs()  # noqa: SLF001
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader of a pipe has left
        pass
    os._exit(code)
