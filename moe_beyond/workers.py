"""Work on many items in several processes, with the results in the order of the items."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, TypeVar

from moe_beyond.errors import UserError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AHEAD = 2
"""Items per worker that are begun before the result of the first is taken, which bounds the memory of results."""


class Workers:
    """Processes that share work; with one, this process does it.

    They start with the first work and end with the block that the object opens.

    Args:
        number: Number of processes.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._open = ExitStack()
        self._pool: ProcessPoolExecutor | None = None
        self._folder = ""

    def __enter__(self) -> "Workers":
        """Prepare the processes."""
        if self.number > 1:
            self._folder = self._open.enter_context(TemporaryDirectory(prefix="moe-beyond-"))
            self._pool = ProcessPoolExecutor(self.number, multiprocessing.get_context("spawn"), _start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the processes, at once after an error."""
        if self._pool is not None:
            if kind is not None:
                for process in list((self._pool._processes or {}).values()):  # noqa: SLF001
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)
        self._open.close()

    def map(
        self, function: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Result]:
        """Apply a function to items.

        Args:
            function: Function of ``shared`` and an item; with several processes, of a module.
            shared: Value for all items; each process reads it once.
            items: Values that each need one call.

        Yields:
            Result of each item, in the order of the items.

        Raises:
            UserError: The function raised it, or a process was killed.
        """
        if self._pool is None:
            for item in items:
                yield function(shared, item)
            return
        handle, task = tempfile.mkstemp(dir=self._folder)
        with os.fdopen(handle, "wb") as file:
            pickle.dump((function, shared), file)
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(_work, task, item))
                if len(pending) == self.number * ITEMS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("--workers: a worker was killed, perhaps for its memory; use fewer workers") from error


def map_in_order(
    function: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item], workers: int = 1
) -> Iterator[Result]:
    """Apply a function to items, as `Workers.map` does, with processes for this call only.

    Args:
        function: Function of ``shared`` and an item; with several processes, of a module.
        shared: Value for all items; each process reads it once.
        items: Values that each need one call.
        workers: Number of processes (default: 1).

    Yields:
        Result of each item, in the order of the items.
    """
    with Workers(workers) as pool:
        yield from pool.map(function, shared, items)


def end_with_parent(worker: int = 0) -> None:
    """End this process when the process that started it is killed; otherwise it would wait forever.

    Args:
        worker: Number of the worker, which a data loader passes (default: 0).
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_task: tuple[str, Callable[[Any, Any], Any], Any] = ("", lambda shared, item: None, None)
"""File, function and shared value of the work that this process did last."""


def _start() -> None:
    """Prepare a process; Ctrl-C is handled by the main process, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _work(task: str, item: Any) -> Any:
    global _task
    if _task[0] != task:
        content = Path(task).read_bytes()
        _task = (task, *pickle.loads(content))  # nosec B301 # written by the main process, in a folder of its own
    return _task[1](_task[2], item)
