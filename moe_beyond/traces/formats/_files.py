"""The files of a recording, in the order that people count in."""

import re
from pathlib import Path

import pyarrow as pa

from moe_beyond.errors import UserError
from moe_beyond.fields import brief


def natural(name: str) -> list[str | int]:
    """Return what sorts names as people count: ``q2`` before ``q10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def source_files(source: Path, suffix: str) -> list[Path]:
    """List a recording's files: itself, or a folder's.

    Args:
        source: A file, or a folder.
        suffix: What their names end in, such as ``.csv``.

    Raises:
        UserError: It is neither, or the folder has none.
    """
    if source.is_dir():
        files = sorted(source.glob(f"*{suffix}"), key=lambda path: natural(path.name))
        if not files:
            raise UserError(f"{source}: holds no *{suffix} file")
        return files
    if not source.is_file() or source.suffix != suffix:
        raise UserError(f"{source}: is neither a *{suffix} file nor a folder of them")
    return [source]


def column_names(path: Path, schema: pa.Schema) -> list[str]:
    """Return the names of a table's columns.

    Raises:
        UserError: One is not UTF-8.
    """
    try:
        return list(schema.names)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a column's name is not UTF-8 ({brief(error)})") from error


def listed(names: list[str]) -> str:
    """Write column names for an error message."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)[:300]
