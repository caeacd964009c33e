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
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near = near or [other for other in known if other.lower() == name.lower()]
    hint = f"did you mean {' or '.join(map(repr, near[:1]))}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}; {hint}")
