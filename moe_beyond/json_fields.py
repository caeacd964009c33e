"""Conditions on the fields of JSON files, as data."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from moe_beyond.errors import UserError
from moe_beyond.safe_text import UNPRINTABLE, shown

MAX_TEXT_LENGTH = 4096
"""Characters of the longest name or description."""
LARGEST_NUMBER = 1e300
"""Largest finite number, within the range of floats."""

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
SCALAR = FieldRule(
    "text, a finite number, true, false or null",
    lambda value: value is None or FLAG.accepts(value) or FINITE.accepts(value) or TEXT.accepts(value),
)
OBJECT = FieldRule(
    "an object", lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
)

TOKENIZER_FIELDS = {"name": TEXT, "vocab_size": whole(1, 2**24), "sha256": optional(SHA256)}
"""Conditions on the record of a tokenizer, in manifests and in training records."""


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


def check_known(rules: Mapping[str, FieldRule], values: Mapping[str, Any], location: str = "") -> None:
    """Refuse an object that has a field without a condition, or a wrong field; fields may be absent.

    Args:
        rules: Condition of each possible field, by name.
        values: Fields, by name.
        location: Text before the name in the message (default: none).

    Raises:
        UserError: A field is unknown or does not satisfy its condition.
    """
    if unknown := [name for name in values if name not in rules]:
        raise UserError(f"{location}field {shown(unknown[0])} is unknown")
    check_fields({name: rule for name, rule in rules.items() if name in values}, values, location)


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
