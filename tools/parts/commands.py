"""Commands of this package as processes that end with the tool that started them."""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from moe_beyond.messages import notify

PR_SET_PDEATHSIG = 1
"""Option of Linux's ``prctl``: the signal that a process gets when its parent ends."""


def run(*words: str, cwd: Path | None = None, log: Path | None = None) -> None:
    """Run a command, which is killed when this process is killed, and which may save its work after Ctrl-C.

    Args:
        *words: Command and its options.
        cwd: Working folder (default: that of this process).
        log: File to which all output is appended (default: the output of this process).

    Raises:
        subprocess.CalledProcessError: The command fails. It has printed the reason, which is also printed here from
            the end of the log.
    """
    command = [sys.executable, "-m", "moe_beyond", *words]
    environment = {"WANDB_MODE": "disabled", **os.environ}
    with nullcontext() if log is None else log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=file, stderr=file, env=environment, preexec_fn=_end_with_parent
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if code:
        if log is not None:
            notify(f"{log}: {_last_line(log)}")
        raise subprocess.CalledProcessError(code, command)


def _end_with_parent() -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "the command failed without a message")
