"""Conditions on the fields of JSON files, as data; and text that is safe to print on a terminal."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from moe_beyond.errors import MAX_SHOWN, UserError
from moe_beyond.urls import without_secrets

MAX_NUMBER_BITS = 256
"""Bits of the largest whole number that a message shows."""
MAX_TEXT_LENGTH = 4096
"""Characters of the longest name or description."""
LARGEST_NUMBER = 1e300
"""Largest finite number, within the range of floats."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, marks that reverse the direction of text, and halves of surrogate pairs."""

Built = TypeVar("Built")


@dataclass(frozen=True)
class FieldRule:
    """A condition on a value.

    Attributes:
        description: The condition, for error messages.
        accepts: Function that returns whether a value satisfies the condition.
    """

    description: str
    accepts: Callable[[Any], bool]


def whole(minimum: int, maximum: int) -> FieldRule:
    """Return the condition for whole numbers within bounds; JSON's true and false are not numbers."""
    return FieldRule(
        f"a whole number within {minimum}..{maximum}",
        lambda value: type(value) is int and minimum <= value <= maximum,
    )


def number(above: float, maximum: float) -> FieldRule:
    """Return the condition for finite numbers above one bound and at most another."""
    return FieldRule(
        f"a number above {above:g}, at most {maximum:g}",
        lambda value: isinstance(value, int | float) and type(value) is not bool and above < value <= maximum,
    )


def optional(rule: FieldRule) -> FieldRule:
    """Return the condition for null or a value that satisfies a condition."""
    return FieldRule(f"{rule.description}, or null", lambda value: value is None or rule.accepts(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT_LENGTH and UNPRINTABLE.search(value) is None


def is_plain_name(value: Any) -> bool:
    """Return whether a value is the name of a file: not a path, and without control characters."""
    return _is_text(value) and value not in ("", ".", "..") and not set(value) & set('/\\:*?"<>|')


TEXT = FieldRule(f"text of at most {MAX_TEXT_LENGTH} characters without control characters", _is_text)
PLAIN_NAME = FieldRule("a plain name (no folders, no control characters)", is_plain_name)
SHA256 = FieldRule(
    "64 hexadecimal digits", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
)
FLAG = FieldRule("true or false", lambda value: type(value) is bool)
FINITE = FieldRule("a finite number", lambda value: type(value) in (int, float) and abs(value) <= LARGEST_NUMBER)
OBJECT = FieldRule(
    "an object", lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
)


def check_fields(rules: Mapping[str, FieldRule], values: Mapping[str, Any], location: str = "") -> None:
    """Refuse values that do not satisfy their conditions.

    Args:
        rules: Condition of each value, by name.
        values: Values, by name.
        location: Text before the name in the message (default: none).

    Raises:
        UserError: A value does not satisfy its condition.
    """
    for name, rule in rules.items():
        if not rule.accepts(values[name]):
            raise UserError(f"{location}{name} must be {rule.description} (got {shown(values[name])})")


def check_present(rules: Mapping[str, FieldRule], values: Mapping[str, Any], location: str = "") -> None:
    """Refuse an object that lacks a field, or has a wrong one.

    Args:
        rules: Condition of each field, by name.
        values: Fields, by name; others than those of the rules are ignored.
        location: Text before the name in the message (default: none).

    Raises:
        UserError: A field is missing or does not satisfy its condition.
    """
    if missing := [name for name in rules if name not in values]:
        raise UserError(f"{location}field {missing[0]!r} is missing")
    check_fields(rules, values, location)


def build(cls: Callable[..., Built], content: Any, name: str) -> Built:
    """Build a dataclass from the fields of a JSON object.

    Args:
        cls: Dataclass to build.
        content: JSON object with its fields.
        name: Name of the object in error messages.

    Raises:
        UserError: ``content`` is not an object, or its fields are missing or unknown.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{name} must be an object (got {shown(content)})")
    expected = {field.name: field.default is MISSING for field in fields(cls)}  # type: ignore[arg-type]
    unknown = [field for field in content if field not in expected]
    missing = [field for field, required in expected.items() if required and field not in content]
    if unknown or missing:
        reason = f"missing: {', '.join(missing)}" if missing else f"unknown: {shown(unknown[0])}"
        raise UserError(f"{name}: fields are missing or unknown ({reason})")
    return cls(**content)


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
