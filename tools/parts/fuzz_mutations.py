"""Part of `fuzz.py`: changes of valid inputs that keep most of their structure.

Every function takes a `random.Random`, which may be seeded, drawn by hypothesis or fed with the bytes of atheris.
"""

import copy
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pyarrow as pa

ODD_TEXTS = (
    "", " ", "0", "-1", "none", "all", "a\nb", "a\r\nerror: b", "\x1b[31m", "\x00", "\u202e", "\u2028", "\ud800", "é",
    "../x", "/etc/passwd", "hf:a/b", "[/b] [bold", "<b>", "%s", "1e5", "NaN", "x" * 300, "٣",
)  # fmt: skip
ODD_NUMBERS = (
    "0", "1", "-1", "2", "0.0", "1.5", ".5", "00", "1e3", "1e-320", "1e308", "1e400", "nan", "inf", "-inf", "255",
    "256", "32768", "2147483648", "9007199254740993", "18446744073709551616",
    "9" * 40, "9" * 5000, "1_0", "0x10", "+3",
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, 1, -1, 2,
    255, 256, 10**4, 2**31, 2**53 + 1, 2**64, 10**40, 0.0, -0.0, 0.5, 1.0, 2.5, 1e-320,
    1e308, float("nan"), float("inf"), -float("inf"), [], {}, [0], [[0]], ["a"], {"a": 1}, [None], [1] * 300,
    *ODD_TEXTS,
)  # fmt: skip
ODD_BYTES = (
    b"\x00",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x80" * 9,
    b"9" * 30,
)
EDITS = (0, 1, 1, 1, 1, 2, 2, 3)
"""Numbers of changes, with their weights; an unchanged input must be accepted."""
TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]+|\s+|.", re.DOTALL)

Edit = Callable[[Any, Random], Any]


def several(edit: Edit, value: Any, chance: Random) -> Any:
    """Change a value several times, or not at all.

    Args:
        edit: Function that returns a changed value.
        value: Value to change; it stays as it is.
        chance: Source of random numbers.
    """
    for _ in range(chance.choice(EDITS)):
        value = edit(value, chance)
    return value


def edited_json(value: Any, chance: Random) -> Any:
    """Return a JSON value with one change: of a value, a key, an element or a field."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return chance.choice(ODD_VALUES)
    parent, key = chance.choice(places)
    kind = chance.randrange(9)
    if kind < 3:
        parent[key] = chance.choice(ODD_VALUES)
    elif kind == 3:
        parent[key] = _nearby(parent[key], chance)
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        other, place = chance.choice(places)
        parent[key] = copy.deepcopy(other[place])
    elif kind == 6 and isinstance(parent, dict):
        parent[chance.choice((*ODD_TEXTS, key + "s", key.upper()))] = parent.pop(key)
    elif kind == 7 and isinstance(parent, dict):
        parent[chance.choice(ODD_TEXTS)] = chance.choice(ODD_VALUES)
    elif isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    else:
        parent[key] = [parent[key]]
    return value


def _places(value: Any) -> "Sequence[tuple[Any, Any]]":
    """Return all places in a JSON value, as a list or an object and its index or key."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        found += [(parent, key) for key in keys]
        waiting += [parent[key] for key in keys]
    return found


def _nearby(value: Any, chance: Random) -> Any:
    """Return a value of the same type that is close."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, 2 * value, 1000 * value, float(value)))
    if isinstance(value, float):
        return chance.choice((-value, value / 1000, value * 1e9, int(value) if abs(value) < 1e15 else 0))
    if isinstance(value, str):
        return edited_text(value, chance)
    return [value] if chance.random() < 0.5 else None


def json_bytes(value: Any, chance: Random) -> bytes:
    """Return a changed JSON value as a file, whose bytes are rarely changed too.

    Args:
        value: JSON value to change.
        chance: Source of random numbers.
    """
    content = json.dumps(several(edited_json, value, chance)).encode("utf-8", "surrogatepass")
    return edited_bytes(content, chance) if chance.random() < 0.05 else content


def edited_text(text: str, chance: Random, words: Sequence[str] = ()) -> str:
    """Return a text with one change of a word, a number, a space or a mark.

    Args:
        text: Text to change.
        chance: Source of random numbers.
        words: Words that may replace others (default: none).
    """
    tokens = TOKEN.findall(text)
    if not tokens:
        return chance.choice((*words, *ODD_TEXTS))
    place = chance.randrange(len(tokens))
    kind = chance.randrange(8)
    if kind < 2:
        tokens[place] = chance.choice(ODD_NUMBERS)
    elif kind < 4 and words:
        tokens[place] = chance.choice(words)
    elif kind == 4:
        del tokens[place]
    elif kind == 5:
        tokens.insert(place, tokens[chance.randrange(len(tokens))])
    elif kind == 6:
        tokens[place] = chance.choice(ODD_TEXTS)
    else:
        numbers = [place for place, token in enumerate(tokens) if token[0].isdigit()]
        if numbers:
            tokens[chance.choice(numbers)] = chance.choice(ODD_NUMBERS)
    return "".join(tokens)


def edited_bytes(content: bytes, chance: Random) -> bytes:
    """Return bytes with one change: a flipped bit, or a part that is cut off, removed, repeated or inserted."""
    if not content:
        return chance.choice(ODD_BYTES)
    begin = chance.randrange(len(content))
    end = min(len(content), begin + chance.choice((1, 1, 2, 8, 100)))
    kind = chance.randrange(5)
    if kind == 0:
        return content[:begin] + bytes([content[begin] ^ 1 << chance.randrange(8)]) + content[begin + 1 :]
    if kind == 1:
        return content[:begin]
    if kind == 2:
        return content[:begin] + content[end:]
    if kind == 3:
        return content[:end] + content[begin:]
    return content[:begin] + chance.choice(ODD_BYTES) + content[begin:]


def edited_lines(lines: Sequence[str], chance: Random) -> list[str]:
    """Return lines with one change: of a line, of its order, or of its number of occurrences."""
    lines = list(lines)
    if not lines:
        return [chance.choice(ODD_TEXTS)]
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.randrange(6)
    if kind == 0:
        del lines[one]
    elif kind == 1:
        lines.insert(other, lines[one])
    elif kind == 2:
        lines[one], lines[other] = lines[other], lines[one]
    else:
        lines[one] = edited_text(lines[one], chance)
    return lines


def edited_table(table: pa.Table, chance: Random) -> pa.Table:
    """Return a table with one change: of its rows, of a column's name, type or values, or without a column."""
    column = chance.randrange(table.num_columns) if table.num_columns else 0
    kind = chance.randrange(6)
    if not table.num_columns or kind == 0:
        return table.slice(0, chance.randrange(table.num_rows + 1))
    name, values = table.column_names[column], table.column(column)
    if kind == 1:
        return table.remove_column(column)
    if kind == 2:
        names = [*table.column_names]
        names[column] = chance.choice(("a", "", "scores", "expert", *names)).encode("utf-8", "replace").decode()
        return table.rename_columns(names)
    items = values.to_pylist()
    if items and kind < 5:
        row = chance.randrange(len(items))
        items[row] = chance.choice((None, items[chance.randrange(len(items))], _other(items[row], chance)))
    try:
        kept = pa.array(items, values.type if kind == 3 else None)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return table
    return table.set_column(column, name, kept)


def _other(item: Any, chance: Random) -> Any:
    """Return another cell of a table, of the same type or not."""
    if isinstance(item, list):
        return several(edited_json, item, chance)
    return chance.choice((-1, 0, 255, 2**31, 2**62, 1.5, float("nan"), 1e300, "a", [item], True))
