"""Text of others as one short line that is safe to print on a terminal, without the secrets of URLs."""

import re
from collections.abc import Mapping
from typing import Any

from moe_beyond.urls import without_secrets

MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""
MAX_NUMBER_BITS = 256
"""Bits of the largest whole number that a message shows."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, marks that reverse the direction of text, and halves of surrogate pairs."""


def shown(value: Any) -> str:
    r"""Return a short form of any value: one line that is safe to print on a terminal.

    Example:
        >>> shown("two\nlines"), shown(-3), shown({"on": []})
        ("'two\\nlines'", '-3', 'an object of 1')
    """
    if isinstance(value, Mapping | list | tuple):  # may be long, or nested too deeply to write out
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:  # Python may refuse to write out longer ones
        return f"a number of {value.bit_length()} bits"
    text = printable(without_secrets(repr(value)))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def printable(text: str) -> str:
    r"""Escape characters that a terminal would obey instead of showing them.

    Args:
        text: Text to print.

    Example:
        >>> printable("a tab\t, red \x1b[31m")
        'a tab\\x09, red \\x1b[31m'
    """
    return UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def printable_lines(text: str) -> str:
    """Escape characters as `printable` does, except line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def brief(message: object, max_length: int = 240) -> str:
    r"""Return the message of a library as one line that is safe to print on a terminal, without the secrets of URLs.

    Args:
        message: Text or exception; its class name replaces an exception without a text.
        max_length: Characters to show; ``...`` replaces further ones (default: 240).

    Example:
        >>> brief("no such key\n  at line 3"), brief(ValueError()), brief("too long a message", 8)
        ('no such key at line 3', 'ValueError', 'too long...')
    """
    text = printable(without_secrets(" ".join(str(message).split()))) or type(message).__name__
    return text if len(text) <= max_length else f"{text[:max_length]}..."
