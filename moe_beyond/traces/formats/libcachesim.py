"""libCacheSim's oracleGeneral: a request every expert of every layer of every token, in the router's order.

An object is ``layer * E + expert``, its size 1: a cache's capacity counts slots. The sequences are one stream, as
``moe-beyond replay --sequential --carry-over`` replays them.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.files import creating
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids

RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next_access", "<i8")])
NEVER = -1
"""The next access of an object that none follows; in memory, libCacheSim would want its largest integer."""
RECORDS_AT_ONCE = 1 << 20


def export_libcachesim(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as an oracleGeneral file.

    Args:
        traces: The trace set.
        out: The file to make.
        split: One split, or all.

    Raises:
        UserError: There is no such split, the file is there already, or the requests are more than it can number.
    """
    geometry = traces.geometry
    base = np.arange(geometry.num_layers)[:, None] * geometry.num_experts
    requests = sum(shard.tokens for shard in traces.shards(split)) * geometry.demand_per_token
    if requests > np.iinfo(np.uint32).max:
        raise UserError(f"{traces.folder}: {requests:,} requests are more than oracleGeneral can number; give --split")
    with creating(out) as temporary:
        ids = [expert_ids(trace.experts, geometry.num_experts) for trace in traces.traces(split)]
        streams = [(entries + base)[entries < geometry.num_experts] for entries in ids]
        write_oracle_general(temporary, np.concatenate(streams))


def write_oracle_general(path: Path, ids: npt.NDArray[np.int64]) -> None:
    """Write a stream of objects, each with its number as time, and when the same is accessed next."""
    order = np.argsort(ids, kind="stable")
    following = np.full(len(ids), NEVER)
    same = ids[order[:-1]] == ids[order[1:]]
    following[order[:-1][same]] = order[1:][same]
    with path.open("wb") as file:
        for start in range(0, len(ids), RECORDS_AT_ONCE):
            part = slice(start, min(start + RECORDS_AT_ONCE, len(ids)))
            records = np.empty(part.stop - start, RECORD)
            records["time"], records["size"] = np.arange(start, part.stop), 1
            records["id"], records["next_access"] = ids[part], following[part]
            file.write(records.tobytes())
