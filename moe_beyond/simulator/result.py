"""Result of a replay; a run under a budget has the same fields."""

from dataclasses import asdict, dataclass
from math import fsum
from typing import Any

import numpy as np

from moe_beyond.cache.counters import COUNTERS, Counter
from moe_beyond.cache.misses import MOVE
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.simulator import devices
from moe_beyond.simulator.computing import left_out
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.simulator.totals import StepTimes, Totals

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
    "left_out",
    "measured",
)
"""Fields without a meaning if there is no device."""


@dataclass(frozen=True)
class Result:
    """Counts and times of a strategy under a budget.

    Attributes:
        strategy: Name of the strategy, or its policy and prefetcher.
        policy: Name of the eviction policy.
        prefetch: Text of the prefetcher.
        predictor: Source of the scores, or None.
        lookahead: Lookahead of the scores that the prefetcher reads, or None.
        leaks: Whether some scores read the router's own input (lookahead 0).
        causal: Whether the scores ignore later tokens.
        scope: ``"global"`` or ``"per-layer"``.
        budget_slots: Budget in slots, each for an expert of mean size where layers differ.
        budget_share: Budget as a share of all experts.
        demand_ratio: Slots divided by L * K; below 1 the cache cannot hold the experts of one token.
        accesses: Number of distinct experts demanded, summed over all events. In a step of several tokens (windows,
            batches, prefill chunks) an expert that several tokens demand is one access.
        demanded: Number of experts demanded token by token; equal to accesses if every token is a step.
        hits: Accesses to experts that were resident when their event began.
        late_hits: Accesses to prefetched experts that were queued or in transit when their event began.
        misses: Accesses to experts that were neither.
        hit_rate: Hits divided by accesses.
        bytes_ratio: Bytes of all transfers divided by those that the tokens demand one by one; 1.0 is one transfer per
            expert that a token demands.
        demand_transfers: Transfers on demand; a miss that the host computes has none.
        prefetch_transfers: Prefetches, including those of late hits, and fills. A warm start counts at every sequence,
            and the best static choice once; both also count with a warm-up.
        useful_prefetches: Prefetches that arrived before their expert was demanded.
        wasted_prefetches: Prefetches whose expert was not demanded before its eviction or the end of the sequence. Late
            hits are neither useful nor wasted.
        per_layer: Counts of each layer, with its hit rate.
        sequences: Number of counted sequences.
        too_short: Number of sequences that are no longer than the warm-up and were left out.
        tokens: Number of counted tokens.
        warmup_tokens: Number of tokens at each sequence's start that are not counted.
        window: Number of drafted tokens per step.
        batch_size: Number of sequences per step.
        prefill_chunk: Number of prompt tokens per step; 0 if every prompt token is a step.
        warm_start: Whether each sequence starts with the most popular experts in the cache.
        carry_over: Whether each sequence starts with the cache of the previous one.
        device: Name of the device, or None; then all times and bytes below are None.
        bytes_per_token: Transferred bytes per counted token.
        stall_ms_per_token: Milliseconds of stall per decoded token.
        compute_ms_per_token: Milliseconds of computing per decoded token.
        tokens_per_second: Decoded tokens per second, over all sequences of a batch; None if no token is decoded.
        token_ms_p50: Median of the milliseconds per decoded token; a token of a window has its share of the window.
        token_ms_p95: 95th percentile of the milliseconds per decoded token.
        token_ms_p99: 99th percentile of the milliseconds per decoded token.
        prefill_ms: Mean milliseconds of a sequence's counted prefill chunks; None without ``--prefill-chunk``.
        link_ms_per_token: Milliseconds for which the interconnect was busy, per token (including uncounted tokens);
            reads from flash are not included.
        device_slots: Number of experts that fit into the device's memory
            (`moe_beyond.simulator.devices.device_slots`); a larger budget does not fit.
        left_out: Fields that the geometry lacks, whose times the timing model leaves out.
        measured: Whether the times were measured in a run, instead of computed by a timing model (default: False).
        on_host: Accesses that the host computed: misses, or late hits in transit.
        miss_handling: Miss handling, ``"move"``, ``"cpu"`` or ``"best"`` (default: ``"move"``).
        note: Note about substitutes and assumptions.
        intervals: 95 % intervals over sequences, ``[low, high]`` by the name of a figure; ``"minus_lru"`` holds
            those of the differences from LRU at the same budget. None if they were not computed.
        budget_bytes: Exact budget in bytes where layers differ; None if all experts have the same size, or the budget
            was given in slots.
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
    left_out: list[str] | None = None
    measured: bool = False
    on_host: int = 0
    miss_handling: str = MOVE
    note: str | None = None
    intervals: dict[str, Any] | None = None
    budget_bytes: int | None = None

    @property
    def fits_device(self) -> bool:
        """Whether the budget fits into the device's memory; true without a device."""
        return self.device_slots is None or self.budget_slots <= self.device_slots

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values; the fields of a device are left out without a device."""
        dropped = {name for name in ("note", "intervals", "budget_bytes") if getattr(self, name) is None}
        dropped |= set(TIMED if self.device is None else ())
        return {name: value for name, value in asdict(self).items() if name not in dropped}


def timed_fields(geometry: Geometry, settings: ReplaySettings, transferred: int, times: StepTimes) -> dict[str, Any]:
    """Return the fields of a `Result` that depend on times; none without a device.

    Sums are exact, so they do not depend on the order of the sequences.

    Args:
        geometry: Geometry of the model.
        settings: Settings of the replay.
        transferred: Units that were transferred.
        times: Times and demand of the steps.
    """
    if settings.device is None or not times.stall_compute:
        return {}
    spent, tokens = np.concatenate(times.stall_compute), np.concatenate(times.tokens)
    decoding = np.concatenate(times.decoding)
    values: dict[str, Any] = {
        "device": settings.device.name,
        "bytes_per_token": float(transferred * geometry.unit_bytes(settings.bits)) / max(int(tokens.sum()), 1),
        "link_ms_per_token": 1e3 * times.busy / max(times.all_tokens, 1),
        "device_slots": devices.device_slots(settings.device, geometry, settings.bits),
        "left_out": left_out(geometry),
    }
    if decoding.any():
        steps, decoded = spent[decoding], int(tokens[decoding].sum())
        each, following = steps.sum(1), np.concatenate(times.in_turn)[decoding]
        by_token = np.repeat(each / following, following)
        p50, p95, p99 = (float(1e3 * np.quantile(by_token, q)) for q in (0.5, 0.95, 0.99))
        values |= {
            "stall_ms_per_token": 1e3 * fsum(steps[:, 0]) / decoded,
            "compute_ms_per_token": 1e3 * fsum(steps[:, 1]) / decoded,
            "tokens_per_second": decoded / fsum(each),
            "token_ms_p50": p50,
            "token_ms_p95": p95,
            "token_ms_p99": p99,
        }
    if settings.prefill_chunk:
        values["prefill_ms"] = 1e3 * fsum(spent[~decoding].ravel()) / len(times.stall_compute)
    return values


def make_result(geometry: Geometry, settings: ReplaySettings, totals: Totals, note: str | None = None) -> Result:
    """Return the result of counts and times; rates are 0 without accesses.

    Args:
        geometry: Geometry of the model.
        settings: Settings of the replay.
        totals: Counts, times and demand.
        note: Note about assumptions (default: the note of the settings).
    """
    counts, times = totals.counts, totals.times
    total = dict(zip(COUNTERS, counts.sum(0).tolist(), strict=True))
    per_layer = [{"layer": layer, **dict(zip(COUNTERS, row, strict=True))} for layer, row in enumerate(counts.tolist())]
    for row in per_layer:
        row["hit_rate"] = row["hits"] / max(row["accesses"], 1)
    accesses = max(total["accesses"], 1)
    transfers = counts[:, [Counter.DEMAND_TRANSFERS, Counter.PREFETCH_TRANSFERS]].sum(1)
    transferred = int(transfers @ np.array(geometry.expert_units))
    demanded = times.demanded if times.units is None else times.demanded_units
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
        bytes_ratio=transferred / max(demanded, 1),
        per_layer=per_layer,
        demanded=times.demanded,
        sequences=totals.sequences,
        too_short=totals.too_short,
        tokens=times.counted_tokens,
        warmup_tokens=settings.warmup_tokens,
        window=settings.window,
        batch_size=settings.batch_size,
        prefill_chunk=settings.prefill_chunk,
        warm_start=settings.warm_start,
        carry_over=settings.carry_over,
        note=note or settings.note,
        budget_bytes=settings.budget_bytes,
        miss_handling=settings.misses,
        **total,
        **timed_fields(geometry, settings, transferred, times),
    )
