"""The files of a recording, in natural order."""

import re
from pathlib import Path

import pyarrow as pa

from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief


def natural(name: str) -> list[str | int]:
    """Return a sort key for natural order: ``q2`` before ``q10``.

    Args:
        name: Name of a file.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def source_files(source: Path, suffix: str) -> list[Path]:
    """Return the files of a recording in natural order.

    Args:
        source: Path of a file or of a folder of files.
        suffix: End of the files' names, such as ``.csv``.

    Raises:
        UserError: The path is neither, the folder has no such file, or one is no regular file.
    """
    if source.is_dir():
        files = sorted(source.glob(f"*{suffix}"), key=lambda path: natural(path.name))
        if not files:
            raise UserError(f"{source}: has no *{suffix} file; give a folder with one, or a file")
        if others := [path for path in files if not path.is_file()]:
            raise UserError(f"{others[0]}: is no regular file; remove it from the folder")
        return files
    if not source.is_file() or source.suffix != suffix:
        raise UserError(f"{source}: is neither a *{suffix} file nor a folder of them; give one of these")
    return [source]


def column_names(path: Path, schema: pa.Schema) -> list[str]:
    """Return the names of a table's columns.

    Args:
        path: Path of the table, for error messages.
        schema: Schema of the table.

    Raises:
        UserError: A name is not UTF-8.
    """
    try:
        return list(schema.names)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the name of a column is not UTF-8 ({brief(error)})") from error


def listed(names: list[str]) -> str:
    """Return column names as text for an error message.

    Args:
        names: Names of the columns.
    """
    return ", ".join(name if name.isprintable() else repr(name) for name in names)[:300]
