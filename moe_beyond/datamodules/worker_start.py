"""Preloaded by the server from which workers are forked: it imports once, and silences workers that start too late.

A worker that starts while the main process ends finds its semaphores removed. Its traceback would follow the last line
of the command, which names the way to continue.
"""

import multiprocessing.synchronize
import sys
import traceback
from types import TracebackType

import moe_beyond.datamodules.stream  # noqa: F401  # what a worker unpickles


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of a process that cannot start, unless its semaphores are gone."""
    frames = traceback.extract_tb(trace)
    if issubclass(kind, FileNotFoundError) and frames and frames[-1].filename == multiprocessing.synchronize.__file__:
        return
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _print_error
