"""The exception whose message is for the user."""

import difflib
from collections.abc import Iterable

from moe_beyond.safe_text import MAX_SHOWN, printable

MAX_MESSAGE = 2000
"""Characters of the longest message; a terminal shows no more at once."""


class UserError(Exception):
    r"""A wrong argument, option or file of the user.

    The message is one line: the file, row or option, what is wrong, and what to do. The command line prints it without
    a traceback and exits with code 2.

    Args:
        message: The line. Characters that a terminal would obey are escaped, because names and values of others are
            part of many messages; ``...`` replaces the characters beyond `MAX_MESSAGE`.

    Example:
        >>> str(UserError("name\n\x1b[31m: is unknown")), len(str(UserError("9" * 5000)))
        ('name\\x0a\\x1b[31m: is unknown', 2003)
    """

    def __init__(self, message: str) -> None:
        line = printable(message)
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}...")


def unknown(kind: str, name: str, names: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list; it contains the nearest name, otherwise the whole list.

    Args:
        kind: Noun for the message, such as ``"policy"``.
        name: Name that was given.
        names: Names that exist.

    Example:
        >>> str(unknown("policy", "lro", ["lru", "lfu", "belady"]))
        "unknown policy 'lro'; did you mean 'lru'?"
        >>> str(unknown("policy", "x", ["lru", "lfu"]))
        "unknown policy 'x'; known: lfu, lru"
        >>> str(unknown("policy", "LRU", ["lru", "lfu"]))
        "unknown policy 'LRU'; did you mean 'lru'?"
    """
    names = sorted(names)
    near = nearest(name, names, cutoff=0.5)
    hint = f"known: {', '.join(names)}" if near is None else f"did you mean {near!r}?"
    shown = repr(name) if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]!r}..."
    return UserError(f"unknown {kind} {shown}; {hint}")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name with the most similar spelling, or with the same letters in another case; None if there is none.

    Args:
        name: Name that was given.
        names: Names to choose from.
        cutoff: Minimum similarity of `difflib`, from 0 to 1 (default: 0.6).

    Example:
        >>> nearest("lro", ["belady", "lru"]), nearest("LRU", ["lru"]), nearest("x", ["lru"])
        ('lru', 'lru', None)
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return next(iter(near or [other for other in names if other.lower() == name.lower()]), None)
