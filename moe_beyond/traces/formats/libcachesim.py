"""libCacheSim's oracleGeneral: one access per expert of every token and layer, in the router's order.

An object is ``layer * E + expert``. Its size is 1, so the capacity of a cache counts slots. The sequences form one
stream, as ``moe-beyond replay --sequential --carry-over`` replays them.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.files import creating
from moe_beyond.traces.formats._format import Format
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids

RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next_access", "<i8")])
NEVER = -1
"""Next access of an object's last request (libCacheSim uses its largest integer only in memory)."""
RECORDS_AT_ONCE = 1 << 20


def export_libcachesim(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as an oracleGeneral file.

    Args:
        traces: The trace set.
        out: Path of the new file.
        split: Name of a split (default: all splits).

    Raises:
        UserError: The split does not exist, the file exists, or the format cannot number that many requests.
    """
    geometry = traces.geometry
    base = np.arange(geometry.num_layers)[:, None] * geometry.num_experts
    requests = sum(shard.tokens for shard in traces.shards(split)) * geometry.demand_per_token
    if requests > np.iinfo(np.uint32).max:
        raise UserError(
            f"{traces.folder}: oracleGeneral numbers at most {np.iinfo(np.uint32).max:,} requests (got {requests:,}); "
            "choose one split with --split"
        )
    with creating(out) as temporary:
        ids = [expert_ids(trace.experts, geometry.num_experts) for trace in traces.traces(split)]
        streams = [(entries + base)[entries < geometry.num_experts] for entries in ids]
        write_oracle_general(temporary, np.concatenate(streams))


def write_oracle_general(path: Path, ids: npt.NDArray[np.int64]) -> None:
    """Write a stream of requests.

    Args:
        path: Path of the file.
        ids: ``(requests,)``, object of each request; its position is its time.
    """
    order = np.argsort(ids, kind="stable")
    next_access = np.full(len(ids), NEVER)
    same = ids[order[:-1]] == ids[order[1:]]
    next_access[order[:-1][same]] = order[1:][same]
    with path.open("wb") as file:
        for start in range(0, len(ids), RECORDS_AT_ONCE):
            part = slice(start, min(start + RECORDS_AT_ONCE, len(ids)))
            records = np.empty(part.stop - start, RECORD)
            records["time"], records["size"] = np.arange(start, part.stop), 1
            records["id"], records["next_access"] = ids[part], next_access[part]
            file.write(records.tobytes())


FORMAT = Format(
    summary="libCacheSim's oracleGeneral: one file, one access per expert of every token and layer",
    writer=export_libcachesim,
)
