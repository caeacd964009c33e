"""The log of another engine's run, stored with its traces: the residency of experts, and times per token.

The file `ENGINE_FILE` of a trace set has one row per sequence. Its columns are the sequence id, the flat residency of
the T*L*K top-k entries, a JSON object with figures of the whole sequence, and one list of T numbers for each metric.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import brief, shown
from moe_beyond.traces.parquet import decode_table, open_parquet

ENGINE_FILE = "engine.log.parquet"
SEQUENCE, RESIDENCY, SUMMARY = "sequence_id", "residency", "summary"


class Residency(IntEnum):
    """Place of a demanded expert when its layer was routed: not in memory, in memory, or there by a prefetch."""

    MISSING = 0
    RESIDENT = 1
    PREFETCHED = 2


@dataclass(frozen=True)
class EngineLog:
    """The log of one sequence.

    Attributes:
        sequence_id: Id of the sequence in the trace set.
        residency: Value of `Residency` of every top-k entry, ``(T, L, K)`` uint8; 0 for padding.
        metrics: Name -> numbers of every token, ``(T,)`` float64, NaN for tokens without metrics; empty if the engine
            wrote none. Names end with their unit: ``wall_ms``, ``io_ms``, ``stall_ms``, ``read_bytes``,
            ``cache_hit_pct`` (cumulative) and others.
        summary: Figures of the whole sequence by name, such as ``cache_budget_MiB`` and ``prefill_s``; empty if the
            engine wrote none.
    """

    sequence_id: str
    residency: npt.NDArray[np.uint8]
    metrics: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)


def engine_table(logs: Sequence[EngineLog]) -> pa.Table:
    """Return logs as the table of `ENGINE_FILE`.

    Args:
        logs: Logs of all sequences of a trace set, all with the same metrics.
    """
    columns: dict[str, pa.Array] = {
        SEQUENCE: pa.array([log.sequence_id for log in logs], pa.string()),
        RESIDENCY: pa.array([log.residency.ravel() for log in logs], pa.list_(pa.uint8())),
        SUMMARY: pa.array([json.dumps(dict(log.summary)) for log in logs], pa.string()),
    }
    for name in logs[0].metrics:
        columns[name] = pa.array([log.metrics[name] for log in logs], pa.list_(pa.float64()))
    return pa.table(columns)


def load_engine_logs(content: bytes, geometry: Geometry, source: str) -> list[EngineLog]:
    """Read the file that holds the table of `engine_table`.

    Args:
        content: Content of the file.
        geometry: Geometry of the trace set.
        source: Path of the file, for error messages.

    Raises:
        UserError: The content is not such a file.
    """
    layers, _, top_k = geometry.shape()
    try:
        file = open_parquet(content)
        rows = decode_table(file, len(content), source).to_pylist()
        logs = [
            EngineLog(
                row[SEQUENCE],
                np.array(row[RESIDENCY], np.uint8).reshape(-1, layers, top_k),
                {name: np.array(row[name], np.float64) for name in row if name not in (SEQUENCE, RESIDENCY, SUMMARY)},
                json.loads(row[SUMMARY]),
            )
            for row in rows
        ]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source}: is no log of an engine ({brief(error)}); import the recording again") from error
    for log in logs:
        _check_log(log, source)
    return logs


def _check_log(log: EngineLog, source: str) -> None:
    """Check the values of a log.

    Raises:
        UserError: A residency is unknown, a metric has another number of tokens, or a figure is no number.
    """
    location = f"{source}: sequence {shown(log.sequence_id)}"
    if log.residency.max(initial=0) > max(Residency):
        raise UserError(f"{location}: has an unknown residency (got {log.residency.max()}); import the recording again")
    if wrong := [name for name, numbers in log.metrics.items() if numbers.shape != log.residency.shape[:1]]:
        raise UserError(f"{location}: {shown(wrong[0])} has another number of tokens; import the recording again")
    figures = log.summary.values() if isinstance(log.summary, Mapping) else [None]
    if not all(type(number) in (int, float) for number in figures):
        raise UserError(f"{location}: its summary must hold numbers; import the recording again")
