"""The record of a replay; a run under a budget fills in the same one."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.core import ACCESSES, COUNTERS, HITS
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.simulator import devices
from moe_beyond.simulator.sequence import Group, Grouping
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
    "device_slots",
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
        accesses: Distinct experts demanded, over all events. Where tokens share a step (windows, batches, prefill
            chunks) an expert that several of them demand is one access.
        demanded: Experts demanded token by token; the same as accesses where every token is a step.
        hits: Resident when their event began.
        late_hits: Asked for, and still waiting for the link or on it then.
        misses: Not asked for.
        hit_rate: Hits over accesses.
        bytes_ratio: All transfers over `demanded`: 1.0 moves one expert for every expert that a token demands.
        demand_transfers: Transfers on demand.
        prefetch_transfers: Transfers ahead of demand, and those of late hits. Those of a warm start count at every
            sequence, and where the best fixed choice is moved in, once; also where a warm-up follows.
        useful_prefetches: Of those, there before they were demanded.
        wasted_prefetches: Of those, not demanded before they left or the sequence ended. Late hits are in neither.
        per_layer: The counts, layer by layer, with each layer's hit rate.
        sequences: Sequences that count.
        too_short: Sequences left out, being no longer than the warm-up.
        tokens: Tokens that count.
        warmup_tokens: Tokens at each sequence's start that do not count.
        window: Drafted tokens that make a step.
        batch_size: Sequences that make a step together.
        prefill_chunk: Prompt tokens that make a step; 0 where each is one.
        warm_start: Whether a sequence finds the most popular experts in the cache.
        carry_over: Whether a sequence finds the cache as the one before left it.
        device: What the times are for, or None: then the fields below are None too.
        bytes_per_token: Bytes moved, over tokens counted.
        stall_ms_per_token: Milliseconds a decoded token waited for experts.
        compute_ms_per_token: Milliseconds it computed.
        tokens_per_second: Of decode, over all sequences of a batch; None where no token is decoded. An upper bound:
            MoE layers only.
        token_ms_p50: Milliseconds of a decoded token, the median; a token of a window takes its share of the window's.
        token_ms_p95: 95 of 100 are not longer.
        token_ms_p99: 99 of 100 are not longer.
        prefill_ms: Milliseconds a sequence's counted prefill chunks took, on average; None without ``--prefill-chunk``.
        link_ms_per_token: Milliseconds the link was busy, over tokens (uncounted ones too).
        device_slots: Experts that the device's memory has room for (`moe_beyond.simulator.devices.device_slots`); a
            larger budget is one that the device cannot hold.
        note: What stands in for what, or was assumed.
        intervals: 95 % intervals over sequences, ``[low, high]`` by the name of a figure; ``"minus_lru"`` holds those
            of the differences from LRU at the same budget. None where none were computed.
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
    demanded: int
    sequences: int
    too_short: int
    tokens: int
    warmup_tokens: int
    window: int
    batch_size: int
    prefill_chunk: int
    warm_start: bool
    carry_over: bool
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
    device_slots: int | None = None
    note: str | None = None
    intervals: dict[str, Any] | None = None

    @property
    def fits_device(self) -> bool:
        """Whether the device's memory holds the budget; true where there is no device."""
        return self.device_slots is None or self.budget_slots <= self.device_slots

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values; without a device, without its fields."""
        dropped = {name for name in ("note", "intervals") if getattr(self, name) is None}
        dropped |= set(TIMED if self.device is None else ())
        return {name: value for name, value in asdict(self).items() if name not in dropped}


@dataclass
class Clock:
    """Times of counted steps, in seconds.

    Attributes:
        spent: ``(S, 2)`` arrays of stall and computing.
        tokens: ``(S,)`` arrays of the tokens of each step.
        in_turn: ``(S,)`` arrays, how many of those follow one another.
        decoding: ``(S,)`` arrays, whether they were decoded.
        busy: How long the link was busy, over all steps, counted or not.
        all_tokens: Of those steps.
        demanded: Experts that the counted steps demanded, token by token.
    """

    spent: list[npt.NDArray[np.float64]] = field(default_factory=list)
    tokens: list[npt.NDArray[np.int64]] = field(default_factory=list)
    in_turn: list[npt.NDArray[np.int64]] = field(default_factory=list)
    decoding: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    busy: float = 0.0
    all_tokens: int = 0
    demanded: int = 0

    def add(self, group: Group, spent: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]) -> int:
        """Note the steps of a sequence.

        Args:
            group: The sequence, or several that are stepped together.
            spent: ``(S, 2)`` seconds of stall and computing.
            counted: ``(S,)``, which steps count.

        Returns:
            The experts that the counted steps demand, token by token.
        """
        self.spent.append(spent[counted])
        self.tokens.append(group.size[counted])
        self.in_turn.append(group.in_turn[counted])
        self.decoding.append(group.decoding[counted])
        self.all_tokens += int(group.size.sum())
        demanded = int(group.demanded()[counted].sum())
        self.demanded += demanded
        return demanded

    def decoded(self) -> tuple[int, float]:
        """Return the tokens and the seconds of the decode that was noted last."""
        decoding = self.decoding[-1]
        return int(self.tokens[-1][decoding].sum()), float(self.spent[-1][decoding].sum())


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
        "device_slots": devices.device_slots(settings.device, geometry, settings.bits),
    }
    if decoding.any():
        steps, decoded = spent[decoding], int(tokens[decoding].sum())
        each, following = steps.sum(1), np.concatenate(clock.in_turn)[decoding]
        by_token = np.repeat(each / following, following)
        p50, p95, p99 = (float(1e3 * np.quantile(by_token, q)) for q in (0.5, 0.95, 0.99))
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
    clock: Clock,
    grouping: Grouping,
    note: str | None = None,
) -> Result:
    """Turn counts into a record; rates are 0 where nothing counted.

    Args:
        geometry: The model.
        settings: Settings of the replay.
        counts: ``(L, 8)`` of `moe_beyond.cache.core.COUNTERS`.
        clock: Times of the steps, and what they demanded.
        grouping: Grouping of the sequences that were counted.
        note: What the result assumes, in words; default: the note of the settings.
    """
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
        bytes_ratio=transfers / max(clock.demanded, 1),
        per_layer=per_layer,
        demanded=clock.demanded,
        sequences=grouping.taken,
        too_short=grouping.too_short,
        tokens=sum(int(tokens.sum()) for tokens in clock.tokens),
        warmup_tokens=settings.warmup_tokens,
        window=settings.window,
        batch_size=settings.batch_size,
        prefill_chunk=settings.prefill_chunk,
        warm_start=settings.warm_start,
        carry_over=settings.carry_over,
        note=note or settings.note,
        **total,
        **timed_fields(geometry, settings, transfers, clock),
    )
