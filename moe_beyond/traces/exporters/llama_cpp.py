"""The CSV that llama.cpp's forks with an expert cache read as a profile: ``position,layer,expert,expert,...``.

Layers count as the model does; the prompt's positions are below zero, and its rows come layer by layer, as
``llama-moe-trace`` writes them. Sequences follow one another, as in profiles that were merged.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from moe_beyond.files import creating
from moe_beyond.geometry import Geometry
from moe_beyond.traces.formats._checks import check_no_padding
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace


def export_llama_cpp(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as one profile.

    Args:
        traces: The trace set.
        out: The file to make.
        split: One split, or all.

    Raises:
        UserError: There is no such split, or the file is there already.
    """
    geometry = traces.geometry
    traces.shards(split)
    names = [f"f{i}" for i in range(2 + geometry.top_k)]
    schema = pa.schema([(name, pa.int64()) for name in names])
    options = pa.csv.WriteOptions(include_header=False)
    with creating(out) as temporary, pa.csv.CSVWriter(temporary, schema, write_options=options) as writer:
        for trace in traces.traces(split):
            check_no_padding(trace, traces)
            writer.write_table(pa.table([*_rows(trace, geometry).T], schema=schema))


def _rows(trace: Trace, geometry: Geometry) -> np.ndarray:
    """Return a sequence's rows: ``(T * L, 2 + K)``."""
    positions = np.arange(len(trace)) - trace.decode_start
    position, layer = np.meshgrid(positions, geometry.moe_layers, indexing="ij")
    entries = np.concatenate([np.stack([position, layer], axis=-1), trace.experts], axis=-1)  # (T, L, 2 + K)
    read = entries[: trace.decode_start].swapaxes(0, 1)
    written = entries[trace.decode_start :]
    return np.concatenate([part.reshape(-1, 2 + geometry.top_k) for part in (read, written)])
