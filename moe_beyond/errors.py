"""The one exception a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, row or option and says what to do. The command line prints it
    without a traceback and exits with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list, naming the near misses or, without any, the whole list.

    Example:
        >>> str(unknown("policy", "lro", ["lru", "lfu", "belady"]))
        "unknown policy 'lro'; did you mean 'lru'?"
        >>> str(unknown("policy", "x", ["lru", "lfu"]))
        "unknown policy 'x'; known: lfu, lru"
        >>> str(unknown("policy", "LRU", ["lru", "lfu"]))
        "unknown policy 'LRU'; did you mean 'lru'?"
    """
    known = sorted(known)
    near = nearest(name, known, cutoff=0.5)
    hint = f"known: {', '.join(known)}" if near is None else f"did you mean {near!r}?"
    return UserError(f"unknown {kind} {name!r}; {hint}")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that is spelt most like another, or like it but for capitals; None if none is.

    Args:
        name: The name that was written.
        names: The names to choose from.
        cutoff: Least similarity, 0 to 1, as `difflib` counts it.

    Example:
        >>> nearest("lro", ["belady", "lru"]), nearest("LRU", ["lru"]), nearest("x", ["lru"])
        ('lru', 'lru', None)
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return next(iter(near or [other for other in names if other.lower() == name.lower()]), None)
