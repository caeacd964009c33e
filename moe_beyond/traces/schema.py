"""The Parquet columns of a trace set: one row a sequence, router order kept.

A token may have fewer than K experts in a layer: where a model has identity or skip experts, a slot that such a one
took holds none. Its id is -1, which in one byte is 255: ids that fit into one end at 254.

Lists are flat (T*L*K) because that is what reads fastest and what no library corrupts; dictionary encoding stays on
because Parquet has no 8-bit type and stores ids as 32-bit integers without it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_beyond.geometry import Geometry
from moe_beyond.traces.trace import Trace

ROWS_PER_GROUP = 64
"""Rows that are stored, and decoded, together."""
ENTRIES_AT_ONCE = 2**15
"""Entries that are checked together: their ids, some 200 kB, stay in a core's cache."""


def experts_dtype(geometry: Geometry) -> np.dtype[np.uint8] | np.dtype[np.int16]:
    """Return the smallest dtype that holds every expert id."""
    return np.dtype(np.uint8) if geometry.num_experts <= 255 else np.dtype(np.int16)


def padding_id(dtype: npt.DTypeLike) -> int:
    """Return what a slot holds that holds no expert.

    Example:
        >>> padding_id(np.uint8), padding_id(np.int16)
        (255, -1)
    """
    return 255 if np.dtype(dtype) == np.uint8 else -1


def expert_ids(experts: npt.NDArray[np.integer[Any]], num_experts: int) -> npt.NDArray[np.int64]:
    """Return ids to count or to index with, E where a slot holds no expert.

    Example:
        >>> expert_ids(np.array([3, 255], np.uint8), 8), expert_ids(np.array([3, -1], np.int16), 300)
        (array([3, 8]), array([  3, 300]))
    """
    ids = experts.astype(np.int64)
    return np.minimum(ids, num_experts) if experts.dtype == np.uint8 else np.where(ids < 0, num_experts, ids)


def check_experts(experts: npt.NDArray[np.integer[Any]], num_experts: int) -> str | None:
    """Say what is wrong with ids ``(..., K)``, if anything is: one that is no expert's, or one twice in an entry."""
    wrong = first_wrong_entry(experts.reshape(-1, experts.shape[-1]), num_experts)
    return None if wrong is None else wrong[1]


def first_wrong_entry(experts: npt.NDArray[np.integer[Any]], num_experts: int) -> tuple[int, str] | None:
    """Find the first entry that no router makes: an id is no expert's, or is there twice.

    Args:
        experts: ``(entries, K)`` ids, `padding_id` where a slot holds no expert.
        num_experts: Experts of a layer, E.

    Returns:
        The entry, and what is wrong with it; None if all are right.
    """
    for start in range(0, len(experts), ENTRIES_AT_ONCE):
        # Ranks as rows: comparing them two by two, shift by shift, is many times faster than sorting entries.
        ranks = np.ascontiguousarray(experts[start : start + ENTRIES_AT_ONCE].T)
        wrong = _wrong_in(ranks, num_experts)
        if wrong is not None:
            return start + wrong[0], wrong[1]
    return None


def _wrong_in(ranks: npt.NDArray[np.integer[Any]], num_experts: int) -> tuple[int, str] | None:
    """Find the first wrong one of ``(K, entries)`` ids, as `first_wrong_entry` does."""
    none = padding_id(ranks.dtype)
    has_empty = not (ranks.min() >= 0 and ranks.max() < num_experts)
    faults: dict[int, str] = {}
    if has_empty:
        outside = ((ranks < 0) | (ranks >= num_experts)) & (ranks != none)
        if outside.any():
            entry = int(outside.any(0).argmax())
            faults[entry] = f"expert id {ranks[:, entry][outside[:, entry]][0]} is out of range 0..{num_experts - 1}"
    for shift in range(1, len(ranks)):
        same = ranks[shift:] == ranks[:-shift]
        if has_empty:
            same &= ranks[shift:] != none
        if same.any():
            faults.setdefault(int(same.any(0).argmax()), "an expert is named twice by one token in one layer")
    return min(faults.items(), default=None)


def has_padding(experts: npt.NDArray[np.integer[Any]]) -> bool:
    """Tell whether any slot holds no expert."""
    return bool((experts == padding_id(experts.dtype)).any())


def arrow_schema(geometry: Geometry, *, gate_weights: bool = False) -> pa.Schema:
    """Return the columns of a shard."""
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
    """Lay traces out as rows.

    Args:
        traces: All with gate weights, or all without.
        geometry: The model's shape.
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
