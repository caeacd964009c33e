"""The files of a recording's telemetry: one Parquet file for each kind of row, and their hashes."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.errors import UserError
from moe_beyond.files import file_in, file_sha256
from moe_beyond.runtime.stepping.telemetry import EventRow, PrefetchRow, StepRow, Telemetry, TransferRow, columns
from moe_beyond.safe_text import brief
from moe_beyond.traces.parquet import decode_table, open_parquet

TELEMETRY_FOLDER = "telemetry"
ROWS: dict[str, type] = {"steps": StepRow, "events": EventRow, "prefetches": PrefetchRow, "transfers": TransferRow}
"""Name of a file -> class of its rows."""
FROM_MINUS_1 = ("sequence", "expert", "slot")
"""Fields that are -1 for none; all others are at least 0."""
AGAIN = "record the run again"


def write_telemetry(folder: Path, telemetry: Telemetry) -> dict[str, str]:
    """Write the rows of a run.

    Args:
        folder: Folder of the recording.
        telemetry: Telemetry that kept its rows.

    Returns:
        Name of each file without its suffix -> its SHA-256.
    """
    (folder / TELEMETRY_FOLDER).mkdir()
    hashes = {}
    for name, kind in ROWS.items():
        path = _path(folder, name)
        pq.write_table(pa.table(columns(getattr(telemetry, name), kind)), path, compression="zstd")
        hashes[name] = file_sha256(path)
    return hashes


def read_telemetry(folder: Path, name: str, sha256: str) -> list[Any]:
    """Read the rows of one kind.

    Args:
        folder: Folder of the recording.
        name: Name of the file without its suffix, a key of `ROWS`.
        sha256: Hash of the file.

    Raises:
        UserError: The file is missing or damaged, or a number is impossible.
    """
    path = _path(folder, name)
    kind = ROWS[name]
    try:
        content = file_in(path.parent, path.name).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path}: is damaged (its sha256 differs from that in the recording); {AGAIN}")
        file = open_parquet(content)
        table = decode_table(file, len(content), str(path))
        values = [_column(table, field.name, field.type, str(path)) for field in fields(kind)]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({brief(error)}); {AGAIN}") from error
    return [kind(*row) for row in zip(*values, strict=True)]


def _column(table: pa.Table, name: str, kind: Any, path: str) -> list[Any]:
    """Return a column as plain values.

    Raises:
        UserError: The column is missing or of another type, or a number is negative or not finite.
    """
    if table.schema.names.count(name) != 1:
        raise UserError(f"{path}: cannot be read (column {name!r} is missing or doubled); {AGAIN}")
    column = table[name]
    if len(column) == 0:  # columns without rows have no type
        return []
    expected = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[kind]
    if column.type != expected or column.null_count:
        raise UserError(f"{path}: column {name!r} must hold {expected} without nulls (got {column.type}); {AGAIN}")
    numbers = column.to_numpy()
    if not np.isfinite(numbers).all() or numbers.min() < (-1 if name in FROM_MINUS_1 else 0):
        raise UserError(f"{path}: column {name!r} holds an impossible number; {AGAIN}")
    values: list[Any] = numbers.tolist()
    return values


def _path(folder: Path, name: str) -> Path:
    return folder / TELEMETRY_FOLDER / f"{name}.parquet"
