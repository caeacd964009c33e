"""YAML files, read without trusting them: bounded in size, depth and values, and never from a pipe."""

import math
from pathlib import Path
from typing import Any

import yaml

from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief, shown

MAX_BYTES = 2**20
"""Maximum size of a file; a run's configuration has a few kilobytes."""
MAX_VALUES = 10_000
"""Maximum number of values in a YAML text after its aliases are expanded; nested aliases can stand for billions."""
MAX_DEPTH = 50
"""Maximum nesting of values; a depth of a thousand can overflow the stack."""
PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError)
"""Errors of the YAML library; ValueError and TypeError concern values such as an impossible date."""


def read_yaml_file(path: str | Path) -> Any:
    """Read a YAML file.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file cannot be read, is too large, or is not YAML.
    """
    text = read_text(path)
    try:
        check_size(text)
        return yaml.load(text, PARSER)  # nosec B506 # a safe loader
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ERRORS as error:
        raise UserError(f"{path}{line_of(error)}: is not YAML ({brief(reason_of(error))})") from error


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds names and values.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file cannot be read, is too large, is not YAML, or holds something else.
    """
    content = read_yaml_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a mapping of names to values (got {shown(content)}); restore the file")
    return content


def read_text(path: str | Path) -> str:
    """Read a text file.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file is missing, is a pipe or a device, is too large, or is not text in UTF-8.
    """
    try:
        if not Path(path).is_file():  # reading a pipe may never end
            problem = "is not a regular file" if Path(path).exists() else "is missing"
            raise UserError(f"{path}: {problem}; name a file")
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes; name a configuration")
        return content.decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8") from error


def check_size(text: str) -> None:
    """Refuse endlessly nested brackets, nested aliases and too many values, before anything is built from them.

    Args:
        text: Content of a YAML file.

    Raises:
        UserError: The text exceeds a bound.
        yaml.YAMLError: The text is not YAML.
    """
    sizes: dict[str, float] = {}  # by anchor, with its aliases expanded; infinite while it is still open
    opened: list[tuple[str | None, float]] = [(None, 0)]
    for event in yaml.parse(text, PARSER):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
            if anchor is not None:
                sizes[anchor] = math.inf
            if len(opened) > MAX_DEPTH:
                raise UserError(f"nests values more than {MAX_DEPTH} deep; flatten them")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        else:
            size = sizes.get(str(anchor), 1) if isinstance(event, yaml.AliasEvent) else 1
        if anchor is not None:
            sizes[anchor] = size
        opened[-1] = opened[-1][0], opened[-1][1] + size
        if opened[-1][1] > MAX_VALUES:
            raise UserError(f"has more than {MAX_VALUES:,} values, with its aliases expanded; write fewer")


def line_of(error: BaseException) -> str:
    """Return the place of an error of the YAML library: ``", line 3"``, or an empty text."""
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def reason_of(error: BaseException) -> object:
    """Return the reason of an error of the YAML library, without the text around its place."""
    return getattr(error, "problem", None) or error
