"""Processes that are killed at a chosen change of the file system."""

import fcntl
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from moe_beyond import unfinished

EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")
"""Events of Python's audit hooks that change the file system; opening a file to write is another one."""
CALLS = ((os, "fsync"), (fcntl, "flock"), (unfinished, "_exchange_names"))
"""Functions without such an event."""


def in_child(act: Callable[[], object]) -> int:
    """Run something in a process of its own and return how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(moment: int, act: Callable[[], object]) -> bool:
    """Run something in a process that is killed before its n-th change of the file system; return whether it was."""
    code = in_child(lambda: (_count_changes(lambda number: die() if number == moment else None), act()))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_changes(change: Callable[[int], Any]) -> None:
    """Call a function with the number of each change, before it, until this process ends."""
    numbers = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or writes:
            change(next(numbers))

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            change(next(numbers))
            return function(*arguments)

        return call

    sys.addaudithook(hook)
    for module, name in CALLS:
        setattr(module, name, counting(getattr(module, name)))
