"""The Parquet columns of a trace set: one row per sequence, expert ids in router order.

A token may use fewer than K experts in a layer, because some models have identity or skip experts. A top-k entry that
such an expert took is padding. Its stored id is -1, or 255 in one byte, so one-byte expert ids end at 254.

Lists are flat (T*L*K): flat lists are read fastest, and no library corrupts them. Dictionary encoding stays on, because
Parquet has no 8-bit type and would store ids as 32-bit integers without it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_beyond.geometry import Geometry
from moe_beyond.traces.trace import Trace

ROWS_PER_GROUP = 64
"""Rows of a Parquet row group, which are decoded together."""
CHECKED_ENTRIES = 2**15
"""Entries that are checked together; their ids, about 200 kB, fit into the cache of a core."""


def experts_dtype(geometry: Geometry) -> np.dtype[np.uint8] | np.dtype[np.int16]:
    """Return the smallest dtype for the expert ids and the padding of a model.

    Args:
        geometry: Shape of the model.
    """
    return np.dtype(np.uint8) if geometry.num_experts <= 255 else np.dtype(np.int16)


def padding_id(dtype: npt.DTypeLike) -> int:
    """Return the id of padding: a top-k entry without an expert.

    Args:
        dtype: Type of the stored ids.

    Example:
        >>> padding_id(np.uint8), padding_id(np.int16)
        (255, -1)
    """
    return 255 if np.dtype(dtype) == np.uint8 else -1


def expert_ids(experts: npt.NDArray[np.integer[Any]], num_experts: int) -> npt.NDArray[np.int64]:
    """Return ids for counting or indexing, with padding as E.

    Args:
        experts: Stored expert ids of any shape.
        num_experts: Experts per layer, E.

    Example:
        >>> expert_ids(np.array([3, 255], np.uint8), 8), expert_ids(np.array([3, -1], np.int16), 300)
        (array([3, 8]), array([  3, 300]))
    """
    ids = experts.astype(np.int64)
    return np.minimum(ids, num_experts) if experts.dtype == np.uint8 else np.where(ids < 0, num_experts, ids)


def check_experts(experts: npt.NDArray[np.integer[Any]], num_experts: int) -> str | None:
    """Describe the first invalid entry; None if there is none.

    Args:
        experts: ``(..., K)`` stored expert ids.
        num_experts: Experts per layer, E.
    """
    fault = first_invalid_entry(experts.reshape(-1, experts.shape[-1]), num_experts)
    return None if fault is None else fault[1]


def first_invalid_entry(experts: npt.NDArray[np.integer[Any]], num_experts: int) -> tuple[int, str] | None:
    """Find the first entry with an id out of range, or with one id twice.

    Args:
        experts: ``(entries, K)`` ids; `padding_id` for padding.
        num_experts: Experts per layer, E.

    Returns:
        Index of the entry and a description of the fault; None if all entries are valid.
    """
    for start in range(0, len(experts), CHECKED_ENTRIES):
        # One row per rank: comparing rows pairwise, shift by shift, is much faster than sorting entries.
        ranks = np.ascontiguousarray(experts[start : start + CHECKED_ENTRIES].T)
        if (fault := _first_fault(ranks, num_experts)) is not None:
            return start + fault[0], fault[1]
    return None


def _first_fault(ranks: npt.NDArray[np.integer[Any]], num_experts: int) -> tuple[int, str] | None:
    """Find the first invalid entry of ``(K, entries)`` ids, as `first_invalid_entry` does."""
    padding = padding_id(ranks.dtype)
    irregular = not (ranks.min() >= 0 and ranks.max() < num_experts)
    faults: dict[int, str] = {}
    if irregular:
        outside = ((ranks < 0) | (ranks >= num_experts)) & (ranks != padding)
        if outside.any():
            entry = int(outside.any(0).argmax())
            faults[entry] = f"expert id {ranks[:, entry][outside[:, entry]][0]} is out of range 0..{num_experts - 1}"
    for shift in range(1, len(ranks)):
        same = ranks[shift:] == ranks[:-shift]
        if irregular:
            same &= ranks[shift:] != padding
        if same.any():
            faults.setdefault(int(same.any(0).argmax()), "an expert occurs twice in one entry")
    return min(faults.items(), default=None)


def has_padding(experts: npt.NDArray[np.integer[Any]]) -> bool:
    """Return whether any top-k entry is padding.

    Args:
        experts: Stored expert ids of any shape.
    """
    return bool((experts == padding_id(experts.dtype)).any())


def arrow_schema(geometry: Geometry, *, gate_weights: bool = False) -> pa.Schema:
    """Return the columns of a shard.

    Args:
        geometry: Shape of the model.
        gate_weights: Whether the shard has gate weights.
    """
    fields = [
        pa.field("sequence_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("decode_start", pa.int32()),
        pa.field("experts", pa.list_(pa.from_numpy_dtype(experts_dtype(geometry)))),
    ]
    if gate_weights:
        fields.append(pa.field("gate_weights", pa.list_(pa.float16())))
    return pa.schema(fields)


def to_table(traces: Sequence[Trace], geometry: Geometry) -> pa.Table:
    """Return a table with one row per trace.

    Args:
        traces: Traces that all have gate weights, or all have none.
        geometry: Shape of the model.
    """
    schema = arrow_schema(geometry, gate_weights=traces[0].gate_weights is not None)
    columns = {
        "sequence_id": [trace.sequence_id for trace in traces],
        "source": [trace.source for trace in traces],
        "token_ids": _flat([trace.token_ids for trace in traces]),
        "decode_start": [trace.decode_start for trace in traces],
        "experts": _flat([trace.experts.ravel() for trace in traces]),
    }
    if "gate_weights" in schema.names:
        columns["gate_weights"] = _flat([t.gate_weights.ravel() for t in traces if t.gate_weights is not None])
    return pa.table(columns, schema=schema)


def _flat(rows: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
