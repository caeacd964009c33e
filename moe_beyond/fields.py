"""Kinds of values that JSON files hold: what each field must be, as data; and text that a terminal can show."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from moe_beyond.errors import UserError

SHOWN = 60
"""Characters of a wrong value that a message shows."""
LONGEST_NUMBER = 256
"""Bits of a whole number that a message shows at most."""
LONGEST_TEXT = 4096
"""Characters of a name or a description at most."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, marks that reverse the direction of text, and halves of surrogate pairs."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Kind:
    """A condition on a value.

    Attributes:
        words: The condition in words, for error messages.
        accepts: Whether a value is of this kind.
    """

    words: str
    accepts: Callable[[Any], bool]


def whole(least: int, most: int) -> Kind:
    """Whole numbers within bounds; JSON's true and false are none."""
    return Kind(f"a whole number within {least}..{most}", lambda value: type(value) is int and least <= value <= most)


def number(above: float, most: float) -> Kind:
    """Finite numbers above a bound, up to another."""
    return Kind(
        f"a number above {above:g}, at most {most:g}",
        lambda value: isinstance(value, int | float) and type(value) is not bool and above < value <= most,
    )


def optional(kind: Kind) -> Kind:
    """Values of a kind, or none."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.accepts(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and UNPRINTABLE.search(value) is None


def is_plain_name(value: Any) -> bool:
    """Tell whether a value names a file directly in a folder: no path, nothing that a terminal obeys."""
    return _is_text(value) and value not in ("", ".", "..") and not set(value) & set('/\\:*?"<>|')


TEXT = Kind(f"text of at most {LONGEST_TEXT} characters without control characters", _is_text)
PLAIN_NAME = Kind("a plain name (no folders, no control characters)", is_plain_name)
SHA256 = Kind(
    "64 hexadecimal digits", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
)
FLAG = Kind("true or false", lambda value: type(value) is bool)


def check_kinds(kinds: Mapping[str, Kind], values: Mapping[str, Any], where: str = "") -> None:
    """Refuse values that are not of their kind.

    Args:
        kinds: The kind of each value, by name.
        values: The values, by name.
        where: Text before the name in the message; default: none.

    Raises:
        UserError: One is of another kind.
    """
    for name, kind in kinds.items():
        if not kind.accepts(values[name]):
            raise UserError(f"{where}{name} must be {kind.words} (got {shown(values[name])})")


def build(made: Callable[..., Made], content: Any, what: str) -> Made:
    """Make a dataclass of the fields of a JSON object.

    Args:
        made: The dataclass.
        content: The object.
        what: Name of the object in error messages.

    Raises:
        UserError: It is no object, or its fields are missing or unknown.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{what} must be an object (got {shown(content)})")
    expected = {field.name: field.default is MISSING for field in fields(made)}  # type: ignore[arg-type]
    unknown = [name for name in content if name not in expected]
    missing = [name for name, needed in expected.items() if needed and name not in content]
    if unknown or missing:
        named = f"missing: {', '.join(missing)}" if missing else f"unknown: {shown(unknown[0])}"
        raise UserError(f"{what}: fields are missing or unknown ({named})")
    return made(**content)


def shown(value: Any) -> str:
    r"""Return a short form of any value, one line that a terminal can show.

    Example:
        >>> shown("two\nlines"), shown(-3), shown({"on": []})
        ("'two\\nlines'", '-3', 'an object of 1')
    """
    if isinstance(value, Mapping | list | tuple):  # which may be long, or too deep to write out
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:  # longer ones Python may refuse to write out
        return f"a number of {value.bit_length()} bits"
    text = printable(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def printable(text: str) -> str:
    r"""Escape what a terminal would obey instead of showing it.

    Example:
        >>> printable("a tab\t, red \x1b[31m")
        'a tab\\x09, red \\x1b[31m'
    """
    return UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def brief(message: object, most: int = 240) -> str:
    r"""Write what a library says as one line that a terminal can show.

    Args:
        message: A text, or an exception; one without a text is named by its class.
        most: Characters to show; what is cut off becomes ``...``.

    Example:
        >>> brief("no such key\n  at line 3"), brief(ValueError()), brief("too long a message", 8)
        ('no such key at line 3', 'ValueError', 'too long...')
    """
    text = printable(" ".join(str(message).split())) or type(message).__name__
    return text if len(text) <= most else f"{text[:most]}..."
