"""The Parquet columns of a trace set: one row a sequence, router order kept.

Lists are flat (T*L*K) because that is what reads fastest and what no library corrupts; dictionary encoding stays on
because Parquet has no 8-bit type and stores ids as 32-bit integers without it.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from moe_beyond.geometry import Geometry
from moe_beyond.traces.trace import Trace


def experts_dtype(geometry: Geometry) -> np.dtype[np.uint8] | np.dtype[np.int16]:
    """Return the smallest dtype that holds every expert id."""
    return np.dtype(np.uint8) if geometry.num_experts <= 255 else np.dtype(np.int16)


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
