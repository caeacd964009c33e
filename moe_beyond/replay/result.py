"""The record of a replay; a run under a budget fills in the same one."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.core import ACCESSES, COUNTERS, HITS
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.replay.settings import ReplaySettings


@dataclass(frozen=True)
class Result:
    """What a strategy was worth under a budget.

    Attributes:
        strategy: Policy and prefetcher, in short.
        policy: Eviction policy.
        prefetch: Prefetcher.
        predictor: Where scores came from, or None.
        lookahead: When they were known, or None.
        causal: Whether they ignored later tokens.
        scope: ``"global"`` or ``"per-layer"``.
        budget_slots: Experts that fit.
        budget_share: The same as a share of all experts.
        demand_ratio: Slots over the experts that one token needs; below 1 not even one token's experts fit.
        accesses: Distinct experts demanded, over all events.
        hits: Resident when their event began.
        late_hits: Asked for, and still on the link then.
        misses: Not asked for.
        hit_rate: Hits over accesses.
        bytes_ratio: All transfers over accesses: 1.0 moves one expert for every access.
        demand_transfers: Transfers on demand.
        prefetch_transfers: Transfers ahead of demand.
        useful_prefetches: Of those, demanded before they left.
        wasted_prefetches: Of those, not demanded before they left or the sequence ended.
        per_layer: The counts, layer by layer, with each layer's hit rate.
    """

    strategy: str
    policy: str
    prefetch: str
    predictor: str | None
    lookahead: Lookahead | None
    causal: bool
    scope: str
    budget_slots: int
    budget_share: float
    demand_ratio: float
    accesses: int
    hits: int
    late_hits: int
    misses: int
    hit_rate: float
    bytes_ratio: float
    demand_transfers: int
    prefetch_transfers: int
    useful_prefetches: int
    wasted_prefetches: int
    per_layer: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)


def make_result(geometry: Geometry, settings: ReplaySettings, counts: npt.NDArray[np.int64]) -> Result:
    """Turn counts ``(L, 8)`` of `moe_beyond.cache.core.COUNTERS` into a record; rates are 0 where nothing counted."""
    total = dict(zip(COUNTERS, counts.sum(0).tolist(), strict=True))
    per_layer = [
        {"layer": layer, **dict(zip(COUNTERS, row, strict=True)), "hit_rate": row[HITS] / max(row[ACCESSES], 1)}
        for layer, row in enumerate(counts.tolist())
    ]
    accesses = max(total["accesses"], 1)
    return Result(
        strategy=settings.strategy,
        policy=settings.policy,
        prefetch=settings.prefetch,
        predictor=settings.predictor,
        lookahead=settings.lookahead,
        causal=settings.causal,
        scope=settings.scope,
        budget_slots=settings.slots,
        budget_share=settings.slots / geometry.total_experts,
        demand_ratio=settings.slots / geometry.demand_per_token,
        hit_rate=total["hits"] / accesses,
        bytes_ratio=(total["demand_transfers"] + total["prefetch_transfers"]) / accesses,
        per_layer=per_layer,
        **total,
    )
