"""Random small replays, and what the package and the plain reference make of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from _helpers.common import QUICK_POLICIES, there, with_holes
from _helpers.reference_cache import COUNTERS, ReferenceCache, Rules, split_slots, union_steps
from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.cache.pools import least_slots, pool_capacities
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.devices import Device
from moe_beyond.simulator.sequence import Group, ReplaySequence
from moe_beyond.usage_profile import AGE_EDGES, RATE_EDGES, UsageProfile, default_hazard

TICK = 0.125
"""Times are whole multiples of it, in seconds: their sums are exact, and can be compared for equality."""
UNIT = 10**8
"""Bytes of the smallest unit of `mixed_geometry`."""
drawn_policies: list[str] = list(QUICK_POLICIES)
"""Policies that `cases` draws by default; slow tests set others."""
MIXED_SIZES = ((1, 3), (3, 1), (1, 2, 3), (3, 2, 1), (1, 1, 4), (4, 1, 1), (1, 3, 1, 3), (2, 1, 4, 1))
PREFETCHES = ("none", "scored", "adaptive", "moe_infinity", "oracle")


def small_geometry(layers: int, experts: int, top_k: int) -> Geometry:
    """A model whose experts are 1 GB at 8 bits."""
    return Geometry("small", tuple(range(layers)), experts, top_k, params_per_expert=10**9, other_params_per_layer=10)


def mixed_geometry(sizes: Sequence[int], experts: int, top_k: int) -> Geometry:
    """A model whose layers differ in bytes, in units of `UNIT`; the mean is two units, so that times are exact."""
    assert sum(sizes) == 2 * len(sizes), "durations are multiples of half of the mean's"
    size = tuple(UNIT * size for size in sizes)
    geometry = small_geometry(len(sizes), experts, top_k)
    return replace(geometry, model="mixed", expert_bytes=size, other_bytes=(0,) * len(sizes))


def ticking(
    transfer: int, other: int = 1, expert: int = 1, flash: int | None = None, host_memory_gb: float | None = None
) -> Device:
    """A device on which, of `small_geometry` at 8 bits, everything takes so many ticks."""
    tick_us = TICK * 1e6
    return Device(
        "ticking",
        link_gb_per_s=8,
        link_latency_us=(transfer - 1) * tick_us,
        memory_gb=1,
        memory_gb_per_s=1,
        host_memory_gb=host_memory_gb,
        flash_gb_per_s=None if flash is None else 8,
        flash_latency_us=0 if flash is None else (flash - 1) * tick_us,
        other_ms=other * TICK * 1e3,
        expert_ms=expert * TICK * 1e3,
    )


@dataclass(frozen=True)
class Outcome:
    """What came of a replay: counts by layer, seconds of stall and computing by counted step, and the link's."""

    counts: list[list[int]]
    spent: list[tuple[float, float]]
    tokens: list[int]
    busy: float


@dataclass(frozen=True)
class Case:
    """A replay: the sequences ``(T, L, K)``, their scores ``(T, H, L, E)``, and what to do with them."""

    geometry: Geometry
    settings: ReplaySettings
    sequences: list[np.ndarray]
    scores: list[np.ndarray]
    decode_starts: list[int]
    profile: UsageProfile
    ticks: tuple[int, int, int, int, int]  # of a transfer, other, an expert, and flash; experts that host memory holds
    costs: tuple[float, float, float] = (0, 0, 0)  # ticks: a token's KV cache in a layer, a step outside, expert FLOPs
    host: tuple[float, float] = (0, 0)  # ticks: an expert on the host, and its FLOPs for a token

    def changed(self, **settings) -> "Case":
        return replace(self, settings=replace(self.settings, **settings))

    def with_holes(self, share: float, seed: int) -> "Case":
        rng = np.random.default_rng(seed)
        return replace(self, sequences=[with_holes(experts, rng, share) for experts in self.sequences])

    def with_ticks(self, transfer: int, other: int, expert: int, flash: int = 0, host_slots: int = 0) -> "Case":
        hosted = (host_slots or 0.5) if flash else None
        device = ticking(transfer, other, expert, flash or None, hosted)
        if not self.geometry.has_one_size:  # no latency, so that a transfer takes as long as its bytes
            mean, reads = 2 * UNIT / 1e9, flash * TICK if flash else None
            device = replace(
                device, link_gb_per_s=mean / (transfer * TICK), link_latency_us=0.0, flash_latency_us=0.0,
                flash_gb_per_s=None if reads is None else mean / reads,
                host_memory_gb=None if hosted is None else hosted * UNIT / 1e9,
            )  # fmt: skip
        ticks = (transfer, other, expert, flash, host_slots)
        case = replace(self.changed(device=device, misses="move"), ticks=ticks, host=(0, 0))
        return case.with_costs(0, 0, 0)

    def with_costs(self, cached: float, outside: float, flops: float) -> "Case":
        kv = int(cached * TICK * 1e9 / 2) * self.geometry.num_layers if cached else None  # 2 bytes each at 1 GB/s
        device = replace(
            self.settings.device,
            token_ms=outside * TICK * 1e3,
            tflops=2e9 / (flops * TICK) / 1e12 if flops else None,
        )
        geometry = replace(self.geometry, kv_values_per_token=kv, other_params_per_layer=0 if flops else 10)
        return replace(self.changed(device=device), geometry=geometry, costs=(cached, outside, flops))

    def with_host(self, misses: str, expert: int, flops: float = 0) -> "Case":
        device = replace(
            self.settings.device,
            host_gb_per_s=float(self.geometry.mean_expert_bytes(8)) / 1e9 / (expert * TICK),
            host_tflops=2e9 / (flops * TICK) / 1e12 if flops else None,
        )
        return replace(self.changed(device=device, misses=misses), host=(expert, flops))

    def on_no_device(self) -> "Case":
        return replace(self.changed(device=None, misses="move"), ticks=(0, 0, 0, 0, 0), costs=(0, 0, 0), host=(0, 0))

    @cached_property
    def batches(self) -> list[list[int]]:
        """Numbers of the sequences that go together; those no longer than the warm-up are skipped."""
        long_enough = [i for i, experts in enumerate(self.sequences) if len(experts) > self.settings.warmup_tokens]
        size = self.settings.batch_size
        return [long_enough[i : i + size] for i in range(0, len(long_enough), size)]

    def stream(self) -> Stream:
        """Demand of all events, the input of a replay that carries its cache over."""
        ids, offsets = [], [0]
        for batch in self.batches:
            part = Group(
                [ReplaySequence(self.geometry, self.sequences[i], None, self.decode_starts[i]) for i in batch],
                self.settings,
            )
            ids.extend(part.stream.ids.tolist())
            offsets.extend((part.stream.offsets[1:] + offsets[-1]).tolist())
        return Stream(np.array(ids, np.int64), np.array(offsets, np.int64))

    def with_room(self) -> "Case":
        """The same with slots for all experts of the largest event."""
        config, layers = self.settings, self.geometry.num_layers
        demanded = np.diff(self.stream().offsets).reshape(-1, layers).max(0, initial=0)
        if config.scope == "global":
            return self.changed(slots=max(config.slots, int(demanded.max())))
        quotas = config.quotas or split_slots(config.slots, layers, config.scope)
        quotas = tuple(max(int(least), slots) for least, slots in zip(demanded, quotas, strict=True))
        return self.changed(slots=sum(quotas), quotas=quotas)

    def replayed(self) -> Replay:
        stream = self.stream() if self.settings.carry_over else None
        replaying = Replay(self.geometry, self.settings, self.profile, stream)
        for experts, scores, start in zip(self.sequences, self.scores, self.decode_starts, strict=True):
            replaying.add(experts, scores if self.settings.lookaheads else None, start)
        return replaying

    def outcome(self) -> Outcome:
        replaying = self.replayed()
        counts = replaying.counts().tolist()
        times = replaying.times
        if self.settings.device is None:  # only sums are kept
            return Outcome(counts, [], [times.counted_tokens], times.busy)
        spent = [tuple(row) for part in times.stall_compute for row in part.tolist()]
        return Outcome(counts, spent, [int(n) for part in times.tokens for n in part], times.busy)

    def rules(self) -> Rules:
        settings, (layers, experts, top_k) = self.settings, self.geometry.shape()
        prefetch = settings.prefetch_settings(self.geometry)
        named = settings.prefetch.split("@")[0].split(",")
        top = [int(part[3:]) for part in named if part.startswith("top")]
        above = [float(part[2:]) for part in named if part.startswith("p>")]
        transfer, other, expert, flash, host_slots = self.ticks
        cached, outside, flops = self.costs
        return Rules(
            layers,
            experts,
            top_k,
            self.pools(),
            policy=settings.policy,
            prefetch="scored" if top or named[0].startswith("p>") else named[0],
            most=top[0] if top else None,
            threshold=above[0] if above else None,
            lookahead=settings.lookahead,
            distance=1 if settings.lookahead == "computed" else max(prefetch.distance, 0),
            first_layers=settings.first_layer_prefetch,
            lookaheads=list(settings.lookaheads),
            warmup=settings.warmup_tokens,
            warm_start=settings.warm_start,
            chunk=settings.prefill_chunk,
            window=settings.window,
            popularity=self.profile.popularity.tolist(),
            hazard=self.profile.hazard.tolist(),
            age_edges=list(AGE_EDGES),
            rate_edges=list(RATE_EDGES),
            transfer=transfer * TICK,
            flash=flash * TICK,
            host_slots=host_slots,
            cold_host=settings.cold_host,
            other=other * TICK,
            cached=cached * TICK,
            outside=outside * TICK,
            expert=expert * TICK,
            flops=flops * TICK,
            misses=settings.misses,
            host=self.host[0] * TICK,
            host_flops=self.host[1] * TICK,
            units=[] if self.geometry.has_one_size else list(self.geometry.expert_units),
        )

    def pools(self) -> list[int]:
        """Slots of every pool, or units where layers differ, which `test_byte_caches` checks."""
        settings = self.settings
        if self.geometry.has_one_size:
            return list(settings.quotas or split_slots(settings.slots, self.geometry.num_layers, settings.scope))
        pools = (settings.slots, settings.scope, settings.quotas, settings.budget_bytes)
        return pool_capacities(self.geometry, *pools).tolist()

    def reference(self) -> Outcome:
        """The same by the plain reference."""
        rules = self.rules()
        parts = [
            union_steps(
                rules,
                [(ragged(self.sequences[i]), self.scores[i].tolist(), self.decode_starts[i]) for i in batch],
            )
            for batch in self.batches
        ]
        if self.settings.carry_over:  # one cache, which finds the sequences one after another
            parts = [[step for part in parts for step in part]]
        counts = [[0] * len(COUNTERS) for _ in range(rules.layers)]
        spent, tokens, busy = [], [], 0.0
        for steps in parts:
            future = [{(layer, e) for e in demand} for step in steps for layer, demand in enumerate(step.demands)]
            cache = ReferenceCache(rules, future)
            if rules.warm_start and steps:
                cache.preload()
            times = cache.run(steps)
            cache.finish()
            busy += cache.busy
            spent += [pair for pair, step in zip(times, steps, strict=True) if step.counted]
            tokens += [step.tokens for step in steps if step.counted]
            for row, found in zip(counts, cache.counts, strict=True):
                for column, name in enumerate(COUNTERS):
                    row[column] += found[name]
        if self.settings.device is None:
            return Outcome(counts, [], [sum(tokens)], busy)
        return Outcome(counts, spent, tokens, busy)


def ragged(experts: np.ndarray) -> list[list[list[int]]]:
    """Return the experts of every token and layer without padding."""
    return [[there(chosen).tolist() for chosen in layers] for layers in experts]


@st.composite
def cases(
    draw: Callable,
    *,
    policies: Sequence[str] | None = None,
    without: Sequence[str] = (),
    prefetches: Sequence[str] = PREFETCHES,
    scopes: Sequence[str] = ("global", "per-layer"),
    plain: bool = False,
    timed: bool | None = None,
    handlings: Sequence[str] = ("move",),
    mixed: bool = False,
    longest: int = 8,
) -> Case:
    """Draw a case.

    ``policies`` are `drawn_policies` by default, ``without`` some. ``plain`` is without warm-up, warm start, carry-over
    and unions, ``timed`` chooses a device, and ``mixed`` a model whose layers differ in bytes.
    """
    layers, num_experts = draw(st.sampled_from([3, 2, 4, 1])), draw(st.sampled_from([4, 5, 6, 3, 2, 1]))
    top_k = draw(st.integers(1, min(3, num_experts)))
    geometry = small_geometry(layers, num_experts, top_k)
    if mixed:
        geometry = mixed_geometry(draw(st.sampled_from(MIXED_SIZES)), num_experts, top_k)
        layers = geometry.num_layers
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # hypothesis leans to monotonous lists
    names = drawn_policies if policies is None else policies
    policy = draw(st.sampled_from([name for name in names if name not in without]))
    prefetch = draw(st.sampled_from(prefetches))
    choices = {} if plain else draw(_unusual(layers))
    if timed is None:
        timed = draw(st.booleans())
    timed = timed or prefetch == "adaptive"
    lookaheads, asked = (), {"prefetch": prefetch}
    if prefetch in ("scored", "adaptive", "moe_infinity") or policy in ("moe_infinity", "belief"):
        several = [(1,), (1, 2, 3), ("token",), (1, 2, 3, "token"), (2,), (1, "next"), (2, "token", "next")]
        several += [("computed",), ("computed", 1, "next"), ("computed", 2), ("computed", "token"), (0, "computed")]
        if prefetch in ("scored", "none"):
            several += [(0,), (0, 1), (0, "computed", 1)]
        if prefetch != "scored":
            several += [("next",)]
        lookaheads = draw(st.sampled_from(several))
    if policy == "moe_spac" and prefetch != "none" and draw(st.booleans()):
        lookaheads = ()  # its own levels are scores
    if prefetch == "scored":
        asked = draw(_scored(num_experts, layers, lookaheads))
    elif prefetch == "adaptive":
        asked["prefetch"] = draw(st.sampled_from(["adaptive", "adaptive,p>0.25"]))
    settings = ReplaySettings(
        geometry.total_experts,
        policy=policy,
        lookaheads=lookaheads,
        first_layer_prefetch=draw(st.sampled_from([True, True, False])),
        bits=8.0,
        device=ticking(1),  # for now
        **asked,
        **choices,
    )
    levels = draw(st.sampled_from([2, 4, 1, 128]))  # few: ties are common; products of three are exact
    lengths = draw(st.lists(st.sampled_from([3, 4, 5, 6, longest, 1, 2]), min_size=1, max_size=3))
    bias = rng.gumbel(size=(layers, num_experts)) * draw(st.sampled_from([0, 1, 2]))
    sequences = [
        np.argsort(-(rng.gumbel(size=(length, layers, num_experts)) + bias), axis=-1)[..., :top_k].astype(np.uint8)
        for length in lengths
    ]  # in any order, as a router's
    scores = [
        (rng.integers(0, levels + 1, (length, len(lookaheads), layers, num_experts)) / levels).astype(np.float32)
        for length in lengths
    ]
    popularity = rng.integers(1, 8, (layers, num_experts)) / 8
    profile = UsageProfile(popularity, default_hazard() if draw(st.booleans()) else rng.integers(1, 8, (8, 8)) / 8)
    starts = [int(rng.integers(0, length + 1)) for length in lengths]
    case = Case(geometry, settings, sequences, scores, starts, profile, (0, 0, 0, 0, 0))
    case = case.changed(**draw(_slots(case, scopes)))
    if not timed:
        return case.on_no_device()
    misses = draw(st.sampled_from(handlings))
    timed_case = case.with_ticks(
        transfer=draw(st.sampled_from([4, 1, 2, 8] if mixed else [3, 1, 2, 5, 8])),
        other=draw(st.sampled_from([1, 2, 4])),
        expert=draw(st.sampled_from([1, 2])),
        flash=draw(st.sampled_from([0, 0, 2, 4] if mixed else [0, 0, 2, 5])) if misses == "move" else 0,
        host_slots=draw(st.sampled_from([2, 0, 1, 4])),
    ).with_costs(
        cached=draw(st.sampled_from([0, 0, 0.5, 1])),
        outside=draw(st.sampled_from([0, 0, 1, 4])),
        flops=draw(st.sampled_from([0, 0, 0.5, 1])),
    )
    if misses == "move":
        return timed_case
    return timed_case.with_host(misses, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([0, 0.5, 1])))


@st.composite
def _unusual(draw: Callable, layers: int) -> dict:
    """Settings that most replays do without."""
    return {
        "warmup_tokens": draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        "warm_start": draw(st.sampled_from([False, False, True])),
        "carry_over": draw(st.sampled_from([False, False, True])),
        "prefill_chunk": draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        "window": draw(st.sampled_from([1, 1, 1, 2, 6])),
        "batch_size": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "cold_host": draw(st.sampled_from([False, False, True])),
    }


@st.composite
def _scored(draw: Callable, experts: int, layers: int, lookaheads: tuple) -> dict:
    """A prefetcher that selects the best of a layer, and the lookahead of its scores."""
    words = draw(st.sampled_from([["top"], ["p"], ["top", "p"]]))
    written = {
        "top": f"top{draw(st.integers(1, experts))}",
        "p": f"p>{draw(st.sampled_from(['0.5', '0', '.25', '1']))}",
    }
    text = ",".join(written[word] for word in words)
    lookahead = draw(st.sampled_from([h for h in lookaheads if h != "next"])) if lookaheads else None
    if lookahead in ("token", None) and draw(st.booleans()):
        text += f"@{draw(st.integers(1, layers + 1))}"
    return {"prefetch": text, "lookahead": lookahead}


@st.composite
def _slots(draw: Callable, case: Case, scopes: Sequence[str]) -> dict:
    """Slots that hold a token's event, and not always more; larger events run in waves."""
    layers, experts, top_k = case.geometry.shape()
    scope = draw(st.sampled_from(scopes))
    if not case.geometry.has_one_size:
        least = min(least_slots(case.geometry, scope), case.geometry.total_experts)
        slots = draw(st.integers(least, min(least + 4, case.geometry.total_experts)) | st.just(layers * experts))
        exact = slots * 2 * UNIT + draw(st.integers(0, 3)) * UNIT // 2
        return {"scope": scope, "slots": slots, "budget_bytes": draw(st.sampled_from([None, exact]))}
    spare = draw(st.sampled_from([0, 1, 2, 3, 4, *range(5, layers * experts)]))
    if scope == "global":
        return {"slots": min(top_k + spare, layers * experts)}
    if draw(st.booleans()):
        quotas = tuple(draw(st.integers(top_k, experts)) for _ in range(layers))
        return {"scope": scope, "slots": sum(quotas), "quotas": quotas}
    return {"scope": scope, "slots": min(layers * top_k + spare, layers * experts)}


def replay(
    geometry: Geometry,
    settings: ReplaySettings,
    experts: list[list[list[int]]],
    scores: np.ndarray | None = None,
    decode_start: int = 0,
    profile: UsageProfile | None = None,
) -> Result:
    """Replay one sequence."""
    replaying = Replay(geometry, settings, profile)
    replaying.add(np.array(experts, np.uint8), scores, decode_start)
    return replaying.result()


def scored(geometry: Geometry, predicted: list[list[list[int]]]) -> np.ndarray:
    """Scores of one lookahead that rank, at every (token, layer), the listed in their order and all others at 0."""
    scores = np.zeros((len(predicted), 1, geometry.num_layers, geometry.num_experts), np.float32)
    for token, layers in enumerate(predicted):
        for layer, experts in enumerate(layers):
            for rank, expert in enumerate(experts):
                scores[token, 0, layer, expert] = 1 - rank / 16
    return scores
