"""Shards in memory: decoded columns of a Parquet table, checked row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import shown
from moe_beyond.traces.checks import first_fault
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.parquet import check_schema
from moe_beyond.traces.trace import Trace


@dataclass(frozen=True)
class Shard:
    """A decoded shard: flat columns, and the offset of each row.

    Attributes:
        geometry: Shape of the model.
        sequence_ids: Sequence id of each row.
        sources: Origin of the text of each row.
        offsets: ``(rows + 1,)`` int64, first token of each row, and the end of the last.
        token_ids: ``(tokens,)`` int32, ids of the tokens.
        experts: ``(tokens, L, K)`` uint8 or int16, as in a `Trace`.
        decode_starts: ``(rows,)`` int32, number of tokens before the decode phase of each row.
        gate_weights: ``(tokens, L, K)`` float16, or None.
        hidden_states: Hidden states of all tokens, or None if they were not read.
    """

    geometry: Geometry
    sequence_ids: list[str]
    sources: list[str]
    offsets: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    experts: npt.NDArray[Any]
    decode_starts: npt.NDArray[np.int32]
    gate_weights: npt.NDArray[np.float16] | None
    hidden_states: HiddenStates | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sequence_ids)

    def trace(self, row: int) -> Trace:
        """Return one row, as views into the shard's arrays.

        Args:
            row: Index of the row.
        """
        part = slice(self.offsets[row], self.offsets[row + 1])
        return Trace(
            sequence_id=self.sequence_ids[row],
            source=self.sources[row],
            token_ids=self.token_ids[part],
            experts=self.experts[part],
            decode_start=int(self.decode_starts[row]),
            gate_weights=None if self.gate_weights is None else self.gate_weights[part],
            hidden_states=None if self.hidden_states is None else self.hidden_states[part],
        )


def decode(table: pa.Table, geometry: Geometry, source: str, vocab_size: int = 2**31) -> Shard:
    """Turn a table of rows into flat arrays, and check every row as `TraceWriter.write` does.

    Args:
        table: Columns of `moe_beyond.traces.schema.arrow_schema`.
        geometry: Shape of the model.
        source: Path of the table, for error messages.
        vocab_size: Number of token ids, all of which are smaller.

    Raises:
        UserError: A column is missing, has another type or holds nulls, or a row does not fit the geometry or is not
            valid routing.
    """
    check_schema(table.schema, geometry, source)
    layers, _, top_k = geometry.shape()
    sequence_ids, offsets, token_ids, decode_starts = decode_texts(table, source)
    expert_offsets, experts = _list_column(table, "experts", source)
    _check_lengths(expert_offsets, offsets, layers * top_k, f"experts must be {layers} x {top_k} ids per token", source)
    gates = None
    if "gate_weights" in table.schema.names:
        gate_offsets, gates = _list_column(table, "gate_weights", source)
        _check_lengths(gate_offsets, expert_offsets, 1, "the numbers of gate weights and experts differ", source)
    shard = Shard(
        geometry=geometry,
        sequence_ids=sequence_ids,
        sources=_strings(table, "source", source),
        offsets=offsets,
        token_ids=token_ids,
        experts=experts.reshape(-1, layers, top_k),
        decode_starts=decode_starts,
        gate_weights=None if gates is None else gates.reshape(-1, layers, top_k),
    )
    fault = first_fault(geometry, vocab_size, offsets, token_ids, decode_starts, shard.experts, shard.gate_weights)
    raise_fault(fault, sequence_ids, source)
    return shard


def decode_texts(
    table: pa.Table, source: str
) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return sequence ids, offsets, token ids and decode starts, as in a `Shard`.

    Args:
        table: Columns of these names.
        source: Path of the table, for error messages.

    Raises:
        UserError: A column holds nulls, or a sequence id is not UTF-8.
    """
    offsets, token_ids = _list_column(table, "token_ids", source)
    _refuse_nulls(table["decode_start"], "decode_start", source)
    decode_starts = table["decode_start"].to_numpy()
    return _strings(table, "sequence_id", source), offsets, token_ids, decode_starts


def _check_lengths(
    offsets: npt.NDArray[np.int64], expected: npt.NDArray[np.int64], times: int, fault: str, source: str
) -> None:
    wrong = np.flatnonzero(np.diff(offsets) != np.diff(expected) * times)
    if len(wrong):
        raise UserError(f"{source}: row {wrong[0]}: {fault}")


def raise_fault(fault: tuple[int, str] | None, sequence_ids: Sequence[str], source: str) -> None:
    """Raise the error for a result of `first_fault`.

    Args:
        fault: Row and description of the fault; None raises nothing.
        sequence_ids: Sequence id of each row.
        source: Path of the rows, for the error message.

    Raises:
        UserError: There is a fault.
    """
    if fault is not None:
        row, description = fault
        raise UserError(f"{source}: row {row} (sequence {shown(sequence_ids[row])}): {description}")


def _refuse_nulls(column: pa.ChunkedArray | pa.Array, name: str, source: str) -> None:
    if column.null_count:
        raise UserError(f"{source}: column {name!r} holds nulls")


def _strings(table: pa.Table, name: str, source: str) -> list[str]:
    _refuse_nulls(table[name], name, source)
    try:
        strings: list[str] = table[name].to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: column {name!r} is not UTF-8") from error
    return strings


def _list_column(table: pa.Table, name: str, source: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Return the offsets and the flat values of a column of lists."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty table
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    _refuse_nulls(column, name, source)
    _refuse_nulls(column.values, name, source)
    return column.offsets.to_numpy().astype(np.int64), column.values.to_numpy(zero_copy_only=False)
