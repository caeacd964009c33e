"""The command ``moe-beyond``: finds the verb, runs it, and turns a user's mistake into one line and exit code 2."""

import atexit
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from moe_beyond.errors import UserError, unknown
from moe_beyond.fields import brief
from moe_beyond.version import __version__

# Group -> verb -> (module of this folder, what it does). A module is imported only when its verb is asked for, so that
# help is instant.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Traces": {
        "collect": ("collect", "run a mixture of experts over prompts and record its routing"),
        "import": ("import_traces", "turn another tool's recording into a trace set"),
        "export": ("export_traces", "write a trace set for another tool"),
        "inspect": ("inspect_traces", "describe a trace set, or contrast two: popularity, locality, dependence"),
    },
    "Predictors": {
        "fit": ("train", "fit a predictor, from a config"),
        "validate": ("train", "validate a checkpoint"),
        "test": ("train", "test a checkpoint"),
        "predict": ("train", "write a checkpoint's scores, sequence by sequence"),
        "package": ("package", "make a predictor folder out of a checkpoint or a run"),
        "push": ("push", "publish a predictor or a trace set on the Hugging Face Hub"),
        "list": ("list_predictors", "list the published predictors with their figures"),
    },
    "Answers": {
        "evaluate": ("evaluate", "recall of a predictor and what it is worth under a budget"),
        "replay": ("replay", "replay traces through a cache under a budget"),
        "report": ("report", "a page to look at, about a predictor or a run"),
        "devices": ("devices", "list the device presets with their numbers and sources"),
        "plan": ("plan", "the smallest budget for a target, and the experts to pin"),
        "quickstart": ("quickstart", "the whole path on a small bundled model, in under three minutes"),
    },
    "Shell": {
        "completion": ("completion", "print a script that completes verbs, options and names"),
    },
}
MEANT = {"train": "fit", "eval": "evaluate", "record": "collect", "simulate": "replay", "upload": "push", "ls": "list"}
"""Verbs of other tools, and the verbs here that do the same."""
VERBS = {verb: entry for group in GROUPS.values() for verb, entry in group.items()}


def usage() -> str:
    """Return the text of ``moe-beyond --help``."""
    lines = [
        "usage: moe-beyond VERB [OPTIONS]",
        "",
        "Record, predict and replay mixture-of-experts routing under a memory budget.",
    ]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb:<11} {summary}" for verb, (_, summary) in verbs.items())]
    return "\n".join(
        [*lines, "", "moe-beyond VERB --help lists a verb's options. moe-beyond --version prints the version."]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: The words after the program's name; those of this process by default.

    Returns:
        The exit code: 0, or 2 where the user gave something wrong.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Idle threads of torch shall sleep at a barrier, not spin: next to other busy processes the spinning takes the very
    # cores that the last thread waits for (a training step on two shared cores was ten times slower). OpenMP reads this
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        if words[0:1] == ["help"]:
            words = [*words[1:2], "--help"]
        if not words or words[0] in ("-h", "--help"):
            print(usage(), file=sys.stdout if words else sys.stderr)
            return 0 if words else 2
        if words[0] in ("--version", "-V", "version"):
            print(f"moe-beyond {__version__}")
            return 0
        if words[0] not in VERBS:
            if words[0] in MEANT:
                raise UserError(f"unknown verb {words[0]!r}; did you mean {MEANT[words[0]]!r}?")
            raise unknown("verb", words[0], VERBS)
        module = importlib.import_module(f"moe_beyond.cli.{VERBS[words[0]][0]}")
        module.run(words)
    except UserError as error:
        print(f"moe-beyond: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # argument parsers end so, after their own message
        if is_interrupt(end):
            print("moe-beyond: interrupted", file=sys.stderr)
            return 130
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path that cannot be read or written
        where = f"{error.filename}: " if error.filename else ""
        print(f"moe-beyond: error: {where}{brief(error.strerror or error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moe-beyond: interrupted", file=sys.stderr)
        return 130
    return 0


def is_interrupt(error: BaseException) -> bool:
    """Tell whether an exception is Ctrl-C, which Lightning turns into an exit with code 1."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code == 1 and isinstance(error.__context__, KeyboardInterrupt)
    )


def console() -> NoReturn:
    """Run this process's command line, and end the process without C++ destructors.

    Arrow and torch keep native threads that nothing in Python can join. Where one of them still runs while static
    objects are destroyed, the process aborts after its work is done, with exit code 134 for 0 or 2.
    """
    code = main()
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001  (waits for Python's threads, as an exit does)
    atexit._run_exitfuncs()  # noqa: SLF001
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader of a pipe has left
        pass
    os._exit(code)
