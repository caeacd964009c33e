"""Limits of the machine that end a command: memory, threads, open files."""

import errno
import re
from collections.abc import Iterator

from moe_beyond.safe_text import brief

MAX_LENGTH = 120
"""Characters of a library's message that are shown."""
LIMITS = {
    "not enough memory": (
        (errno.ENOMEM,),
        re.compile(r"bad_alloc|can(?:no|')t allocate memory|unable to allocate|failed to map segment|malloc", re.I),
        "free some memory or raise its limit (ulimit -v)",
    ),
    "too many threads or processes": (
        (errno.EAGAIN,),
        re.compile(r"can't start new thread|resource temporarily unavailable", re.I),
        "stop other processes or raise the limit (ulimit -u, ulimit -v)",
    ),
    "too many open files": (
        (errno.EMFILE, errno.ENFILE),
        re.compile(r"too many open files|items of ancdata", re.I),
        "raise the limit (ulimit -n) or use fewer workers",
    ),
}
"""Limit -> error numbers, messages of libraries, and advice."""


def exceeded_limit(error: BaseException) -> str | None:
    """Return one line about the limit that ended a command; None for another error.

    Args:
        error: Error of a library or of the system.
    """
    for each in _chain(error):
        for limit, (numbers, messages, advice) in LIMITS.items():
            of_memory = isinstance(each, MemoryError) and numbers[0] == errno.ENOMEM
            of_system = isinstance(each, OSError) and each.errno in numbers
            of_library = isinstance(each, (RuntimeError, ImportError, OSError)) and messages.search(str(each))
            if of_memory or of_system or of_library:
                text = next(reversed(str(getattr(each, "filename", None) or each).strip().splitlines()), "")
                reason = f" ({brief(text, MAX_LENGTH)})" if text else ""
                return f"{limit}{reason}; {advice}, then run the same command again"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and those that led to it."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
