"""Reading the Parquet file of a shard, whose footer is compared with the manifest before anything is decoded."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import brief, printable, shown
from moe_beyond.traces.schema import ROWS_PER_GROUP, arrow_schema

BOMB_BYTES, BOMB_RATIO = 2**28, 100
"""A file is refused if it would decode into more bytes than the first and into the second times its size. Recorded
routing compresses only a few times."""
TEXT_BYTES = 2**23
"""Bytes of the texts of one row group, of which a batch may repeat each for every row."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
"""Bytes of a decoded value, by physical type; other types have a length of their own, or that of their column."""


def read_columns(
    content: bytes, columns: list[str], geometry: Geometry, sequences: int, tokens: int, source: str
) -> pa.Table:
    """Read some columns of a shard.

    Args:
        content: Content of the file.
        columns: Names of the columns to read; ``gate_weights`` may be absent.
        geometry: Shape of the model.
        sequences: Number of rows in the manifest.
        tokens: Number of tokens in the manifest.
        source: Path of the file, for error messages.

    Raises:
        UserError: The file is not Parquet, lacks a column, differs from the manifest, or would exhaust the memory.
    """
    try:
        file = open_parquet(content)
        _check_footer(file, geometry, sequences, tokens, source)
        names = [name for name in columns if name in file.schema_arrow.names or name != "gate_weights"]
        table = decode_table(file, len(content), source, names)
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{source}: cannot be read as Parquet ({brief(error)}); get the trace set again") from error
    return table


def open_parquet(source: bytes | Path) -> pq.ParquetFile:
    """Open a file whose footer can be inspected.

    ``RowGroupMetaData.column`` ends the process if a footer contradicts itself (pyarrow 26). The reader of batches
    makes the same checks and raises an exception; a batch of no rows decodes nothing.

    Args:
        source: Content or path of the file.

    Raises:
        pa.ArrowException: The source is not a Parquet file.
        OSError: The source cannot be read, or its footer contradicts itself.
    """
    file = pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source))
    columns = list(range(file.metadata.num_columns))
    for group in range(file.metadata.num_row_groups if columns else 0):
        next(file.reader.iter_batches(0, row_groups=[group], column_indices=columns), None)
    return file


def _check_footer(file: pq.ParquetFile, geometry: Geometry, sequences: int, tokens: int, source: str) -> None:
    """Compare the footer's columns and counts with the geometry and the manifest."""
    names, metadata = file.schema_arrow.names, file.metadata
    check_schema(file.schema_arrow, geometry, source)
    if metadata.num_rows != sequences:
        raise UserError(f"{source}: holds {metadata.num_rows} sequences, but the manifest lists {sequences}")
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    values = {
        leaf.path.partition(".")[0]: sum(group.column(index).num_values for group in groups)
        for index, leaf in enumerate(leaves)
    }
    entries = tokens * geometry.demand_per_token
    for name, expected in (("token_ids", tokens), ("experts", entries), ("gate_weights", entries)):
        if (
            name in names and not expected <= values[name] <= expected + sequences
        ):  # Parquet counts an empty list as a value
            raise UserError(
                f"{source}: column {name!r} must hold {expected} values for {tokens} tokens (got {values[name]})"
            )


def decode_table(file: pq.ParquetFile, size: int, source: str, columns: list[str] | None = None) -> pa.Table:
    """Decode a file, unless it would decode into far more bytes than it has.

    Args:
        file: File whose footer was read.
        size: Size of the file, in bytes.
        source: Path of the file, for error messages.
        columns: Names of the columns (default: all).

    Raises:
        UserError: The file would exhaust the memory.
    """
    check_size(file, size, source)
    batches, decoded = [], 0
    # Group by group: a whole column, with the levels of its lists, takes several times the memory.
    for batch in file.iter_batches(ROWS_PER_GROUP, columns=columns):
        decoded += batch.nbytes
        _check_decoded(decoded, size, source)
        batches.append(batch)
    table = pa.Table.from_batches(batches, None if batches else file.schema_arrow)
    table.validate()
    return table


def check_size(file: pq.ParquetFile, size: int, source: str) -> None:
    """Refuse a file whose footer counts far more bytes than it has.

    Args:
        file: File whose footer was read.
        size: Size of the file, in bytes.
        source: Path of the file, for error messages.

    Raises:
        UserError: The file would exhaust the memory.
    """
    metadata = file.metadata
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    decoded = 0
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        for index, leaf in enumerate(leaves):
            chunk = group.column(index)
            width = WIDTHS.get(leaf.physical_type, max(leaf.length, 0))
            decoded += chunk.total_uncompressed_size + width * chunk.num_values
            if leaf.physical_type == "BYTE_ARRAY" and chunk.total_uncompressed_size > TEXT_BYTES:
                raise UserError(f"{source}: {shown(leaf.path)} holds texts of {chunk.total_uncompressed_size:,} bytes")
    _check_decoded(decoded, size, source)


def _check_decoded(decoded: int, size: int, source: str) -> None:
    if decoded > max(BOMB_BYTES, BOMB_RATIO * size):
        raise UserError(
            f"{source}: {size:,} bytes would decode into {decoded:,}; recorded routing never compresses so far"
        )


def check_schema(schema: pa.Schema, geometry: Geometry, source: str) -> None:
    """Check that a shard has every column once and with the right type.

    Args:
        schema: Schema of the shard.
        geometry: Shape of the model.
        source: Path of the shard, for error messages.

    Raises:
        UserError: A column is missing, doubled or of another type.
    """
    for field in arrow_schema(geometry, gate_weights="gate_weights" in schema.names):
        if (count := schema.names.count(field.name)) != 1:
            raise UserError(f"{source}: column {field.name!r} is {'missing' if count == 0 else 'doubled'}")
        if (kind := schema.field(field.name).type) != field.type:
            raise UserError(f"{source}: column {field.name!r} must be {field.type} (got {printable(str(kind))})")
