"""Preloaded by the server from which workers are forked: it imports once, and changes how workers fail.

A worker that starts while the main process ends finds its semaphores removed. Its traceback would follow the last line
of the command, which names the way to continue.

A worker that cannot send a batch ends. Python would drop the batch, and the main process would wait for it.
"""

import multiprocessing.queues
import multiprocessing.synchronize
import os
import sys
import traceback
from types import TracebackType

import moe_beyond.datamodules.stream  # noqa: F401  # what a worker unpickles
from moe_beyond.messages import print_error


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of a process that cannot start, unless its semaphores are gone."""
    frames = traceback.extract_tb(trace)
    if issubclass(kind, FileNotFoundError) and frames and frames[-1].filename == multiprocessing.synchronize.__file__:
        return
    sys.__excepthook__(kind, error, trace)


def _end_worker(error: Exception, batch: object) -> None:
    """End a process whose batch cannot be sent."""
    print_error(f"a worker cannot send a batch: {error}; use fewer workers or data.num_workers 0")
    os._exit(1)


sys.excepthook = _print_error
multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined] # noqa: SLF001
