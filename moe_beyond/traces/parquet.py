"""Reading the Parquet file of a shard, whose footer is compared with the manifest before anything is decoded."""

import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.json_fields import brief, printable
from moe_beyond.traces.schema import ROWS_PER_GROUP, arrow_schema, experts_dtype

BOMB_BYTES, BOMB_RATIO = 2**28, 100
"""A file is refused if it would decode into more bytes than the first and into the second times its size. Recorded
routing compresses only a few times."""


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
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_footer(file, len(content), geometry, sequences, tokens, source)
        names = [name for name in columns if name in file.schema_arrow.names or name != "gate_weights"]
        # Group by group: a whole column, with the levels of its lists, takes several times the memory.
        table = pa.Table.from_batches(list(file.iter_batches(ROWS_PER_GROUP, columns=names)))
        table.validate()
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{source}: cannot be read as Parquet ({brief(error)}); get the trace set again") from error
    return table


def _check_footer(
    file: pq.ParquetFile, size: int, geometry: Geometry, sequences: int, tokens: int, source: str
) -> None:
    """Compare the footer's counts with the manifest, and the decoded size with the size of the file."""
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
    widths = {"token_ids": 4, "experts": experts_dtype(geometry).itemsize, "gate_weights": 2}
    decoded = sum(width * values.get(name, 0) for name, width in widths.items())
    decoded += sum(group.column(index).total_uncompressed_size for group in groups for index in range(len(leaves)))
    if decoded > max(BOMB_BYTES, BOMB_RATIO * size):
        raise UserError(
            f"{source}: {size:,} bytes would decode into {decoded:,}; recorded routing never compresses so far"
        )
    for name, expected in (("token_ids", tokens), ("experts", entries), ("gate_weights", entries)):
        if (
            name in names and not expected <= values[name] <= expected + sequences
        ):  # Parquet counts an empty list as a value
            raise UserError(
                f"{source}: column {name!r} must hold {expected} values for {tokens} tokens (got {values[name]})"
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
