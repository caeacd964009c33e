"""The record of a replay; a run under a budget fills in the same one."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.core import ACCESSES, COUNTERS, HITS
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.simulator.settings import ReplaySettings

TIMED = (
    "device",
    "bytes_per_token",
    "stall_ms_per_token",
    "compute_ms_per_token",
    "tokens_per_second",
    "token_ms_p50",
    "token_ms_p95",
    "token_ms_p99",
    "prefill_ms",
    "link_ms_per_token",
)
"""The fields that only a device fills."""


@dataclass(frozen=True)
class Result:
    """What a strategy was worth under a budget.

    Attributes:
        strategy: Its name, or policy and prefetcher in short.
        policy: Eviction policy.
        prefetch: Prefetcher.
        predictor: Where scores came from, or None.
        lookahead: When they were known, or None; of several the one that the prefetcher asked by.
        leaks: Whether some of them read the router's own input: lookahead 0.
        causal: Whether they ignored later tokens.
        scope: ``"global"`` or ``"per-layer"``.
        budget_slots: Experts that fit.
        budget_share: The same as a share of all experts.
        demand_ratio: Slots over the experts that one token needs; below 1 not even one token's experts fit.
        accesses: Distinct experts demanded, over all events.
        hits: Resident when their event began.
        late_hits: Asked for, and still waiting for the link or on it then.
        misses: Not asked for.
        hit_rate: Hits over accesses.
        bytes_ratio: All transfers over accesses: 1.0 moves one expert for every access.
        demand_transfers: Transfers on demand.
        prefetch_transfers: Transfers ahead of demand, and those of late hits.
        useful_prefetches: Of those, there before they were demanded.
        wasted_prefetches: Of those, not demanded before they left or the sequence ended.
        per_layer: The counts, layer by layer, with each layer's hit rate.
        device: What the times are for, or None: then the fields below are None too.
        bytes_per_token: Bytes moved, over tokens counted.
        stall_ms_per_token: Milliseconds a decoded token waited for experts.
        compute_ms_per_token: Milliseconds it computed.
        tokens_per_second: Of decode, over all sequences of a batch; None where no token is decoded.
        token_ms_p50: Of the steps of decode, the median in milliseconds.
        token_ms_p95: 95 of 100 are not longer.
        token_ms_p99: 99 of 100 are not longer.
        prefill_ms: Milliseconds a sequence's counted prefill chunks took, on average; None without ``--prefill-chunk``.
        link_ms_per_token: Milliseconds the link was busy, over tokens (uncounted ones too).
        note: What stands in for what, or was assumed.
    """

    strategy: str
    policy: str
    prefetch: str
    predictor: str | None
    lookahead: Lookahead | None
    leaks: bool
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
    device: str | None = None
    bytes_per_token: float | None = None
    stall_ms_per_token: float | None = None
    compute_ms_per_token: float | None = None
    tokens_per_second: float | None = None
    token_ms_p50: float | None = None
    token_ms_p95: float | None = None
    token_ms_p99: float | None = None
    prefill_ms: float | None = None
    link_ms_per_token: float | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values; without a device, without its fields."""
        dropped = {*(TIMED if self.device is None else ()), *(("note",) if self.note is None else ())}
        return {name: value for name, value in asdict(self).items() if name not in dropped}


@dataclass
class Clock:
    """Times of counted steps, in seconds.

    Attributes:
        spent: ``(S, 2)`` arrays of stall and computing.
        tokens: ``(S,)`` arrays of the tokens of each step.
        decoding: ``(S,)`` arrays, whether they were decoded.
        busy: How long the link was busy, over all steps, counted or not.
        all_tokens: Of those steps.
    """

    spent: list[npt.NDArray[np.float64]] = field(default_factory=list)
    tokens: list[npt.NDArray[np.int64]] = field(default_factory=list)
    decoding: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    busy: float = 0.0
    all_tokens: int = 0

    def add(
        self, spent: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], decoding: npt.NDArray[np.bool_]
    ) -> None:
        """Note the counted steps of a sequence."""
        self.spent.append(spent)
        self.tokens.append(tokens)
        self.decoding.append(decoding)


def timed_fields(geometry: Geometry, settings: ReplaySettings, transfers: int, clock: Clock) -> dict[str, Any]:
    """Turn times into the fields of a `Result`; none without a device."""
    if settings.device is None or not clock.spent:
        return {}
    spent, tokens, decoding = np.concatenate(clock.spent), np.concatenate(clock.tokens), np.concatenate(clock.decoding)
    bytes_per_expert = geometry.params_per_expert * settings.bits / 8
    found: dict[str, Any] = {
        "device": settings.device.name,
        "bytes_per_token": transfers * bytes_per_expert / max(int(tokens.sum()), 1),
        "link_ms_per_token": 1e3 * clock.busy / max(clock.all_tokens, 1),
    }
    if decoding.any():
        steps, decoded = spent[decoding], int(tokens[decoding].sum())
        each = steps.sum(1)
        p50, p95, p99 = (float(1e3 * np.quantile(each, q)) for q in (0.5, 0.95, 0.99))
        found |= {
            "stall_ms_per_token": float(1e3 * steps[:, 0].sum() / decoded),
            "compute_ms_per_token": float(1e3 * steps[:, 1].sum() / decoded),
            "tokens_per_second": float(decoded / each.sum()),
            "token_ms_p50": p50,
            "token_ms_p95": p95,
            "token_ms_p99": p99,
        }
    if settings.prefill_chunk:
        found["prefill_ms"] = float(1e3 * spent[~decoding].sum() / len(clock.spent))
    return found


def make_result(
    geometry: Geometry,
    settings: ReplaySettings,
    counts: npt.NDArray[np.int64],
    clock: Clock | None = None,
    note: str | None = None,
) -> Result:
    """Turn counts ``(L, 8)`` of `moe_beyond.cache.core.COUNTERS` into a record; rates are 0 where nothing counted."""
    total = dict(zip(COUNTERS, counts.sum(0).tolist(), strict=True))
    per_layer = [
        {"layer": layer, **dict(zip(COUNTERS, row, strict=True)), "hit_rate": row[HITS] / max(row[ACCESSES], 1)}
        for layer, row in enumerate(counts.tolist())
    ]
    accesses = max(total["accesses"], 1)
    transfers = total["demand_transfers"] + total["prefetch_transfers"]
    return Result(
        strategy=settings.strategy,
        policy=settings.policy,
        prefetch=settings.prefetch,
        predictor=settings.predictor,
        lookahead=settings.lookahead,
        leaks=settings.lookahead == 0 or (settings.reads_all_scores and 0 in settings.lookaheads),
        causal=settings.causal,
        scope=settings.scope,
        budget_slots=settings.slots,
        budget_share=settings.slots / geometry.total_experts,
        demand_ratio=settings.slots / geometry.demand_per_token,
        hit_rate=total["hits"] / accesses,
        bytes_ratio=transfers / accesses,
        per_layer=per_layer,
        note=note or settings.note,
        **total,
        **timed_fields(geometry, settings, transfers, clock or Clock()),
    )
