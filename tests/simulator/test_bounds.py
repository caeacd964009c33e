"""Baselines of a replay: by brute force, and by its formula."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from _helpers.cache_cases import TICK, small_geometry, ticking
from _helpers.reference_cache import ReferenceCache, Rules
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.bounds import Bound, demand
from moe_beyond.simulator.computing import resident_seconds
from moe_beyond.simulator.sequence import ReplaySequence


def bound(geometry: Geometry, config: ReplaySettings, sequences: Iterable[np.ndarray]) -> Result:
    found = [ReplaySequence(geometry, experts) for experts in sequences]
    accumulating = Bound(geometry, config, demand(geometry, config, found))
    for sequence in found:
        accumulating.add_sequence(sequence)
    return accumulating.result()


def drawn(seed: int, geometry: Geometry) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    layers, experts, top_k = geometry.shape()
    return [np.argsort(rng.random((n, layers, experts)))[..., :top_k] for n in rng.integers(1, 6, 3)]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(2, 7),
    scope=st.sampled_from(["global", "per-layer"]),
    warmup=st.integers(0, 2),
    window=st.integers(1, 2),
)
def test_no_fixed_set_hits_more_often(seed: int, slots: int, scope: str, warmup: int, window: int):
    geometry = small_geometry(2, 4, 1)
    sequences = drawn(seed, geometry)
    config = ReplaySettings(
        slots, policy="static_hindsight", scope=scope, warmup_tokens=warmup, window=window, device=ticking(3), bits=8.0
    )
    events = [
        {(layer, int(expert)) for token in experts[begin : begin + window] for expert in token[layer]}
        for experts in sequences
        if len(experts) > warmup
        for begin in range(warmup, len(experts), window)
        for layer in range(2)
    ]
    everyone = [(layer, expert) for layer in range(2) for expert in range(4)]
    first = [slots - slots // 2, slots // 2]

    def fits(chosen: tuple) -> bool:
        return scope == "global" or [sum(layer == e[0] for e in chosen) for layer in range(2)] == first

    most = max(
        sum(len(event & set(chosen)) for event in events) for chosen in combinations(everyone, slots) if fits(chosen)
    )
    result = bound(geometry, config, sequences)
    assert result.accesses == sum(map(len, events))
    assert result.hits == most
    assert result.misses == result.demand_transfers == result.accesses - most
    assert result.prefetch_transfers == result.useful_prefetches <= slots  # moved in once: those that are used
    if result.accesses:
        tokens = sum(len(experts) - warmup for experts in sequences if len(experts) > warmup)
        waited = result.stall_ms_per_token * tokens / (TICK * 1e3)
        assert 2 * result.misses - 1e-9 <= waited <= 3 * result.misses + 1e-9  # one tick may be another's computing


def test_static_hindsight_by_hand():
    # Layer a: 0 0 1, layer b: 2 2 2; two slots: a0 and b2 hit 5 of 6, moved in once each.
    geometry = small_geometry(2, 4, 1)
    trace = [np.array([[[0], [2]], [[0], [2]], [[1], [2]]])]
    result = bound(geometry, ReplaySettings(2, policy="static_hindsight"), trace)
    assert (result.hits, result.misses, result.prefetch_transfers) == (5, 1, 2)
    assert [row["hits"] for row in result.per_layer] == [2, 3]
    assert result.bytes_ratio == 3 / 6


def test_all_resident_moves_nothing_and_takes_the_resident_time():
    geometry = small_geometry(2, 4, 2)
    device = ticking(3, other=2, expert=1)
    config = ReplaySettings(8, policy="all_resident", device=device, bits=8.0)
    result = bound(geometry, config, drawn(0, geometry))
    assert (result.hit_rate, result.misses, result.bytes_ratio, result.stall_ms_per_token) == (1, 0, 0, 0)
    assert result.tokens_per_second == pytest.approx(1 / resident_seconds(device, geometry, 8.0)) == 1 / (8 * TICK)
    # A replay whose slots hold all, once they came in, is as fast.
    replaying = Replay(geometry, replace(config, policy="lru", warmup_tokens=4))
    replaying.add(np.stack([[[[0, 1]] * 2, [[2, 3]] * 2][i % 2] for i in range(8)]))
    assert replaying.result().tokens_per_second == pytest.approx(result.tokens_per_second)


def test_static_hindsight_reads_flash_by_hand():
    # One layer of six experts, K = 1, room for one: 0 is fixed. A transfer takes 1 tick, flash 2 more. Host memory
    # holds two, at first 0 and 1, of which 1 would leave. Sequence 1: 0 hits | 1: 1 tick | 2: 3 ticks, 0 leaves |
    # 1: 1 tick | 3: 3 ticks, 2 leaves | 0 hits | 0 hits. Sequence 2, begun alike: 3: 3 ticks | 0 hits.
    geometry = small_geometry(1, 6, 1)
    device = ticking(1, flash=2, host_memory_gb=2)
    traces = [np.array(t).reshape(-1, 1, 1) for t in ([0, 1, 2, 1, 3, 0, 0], [3, 0])]
    config = ReplaySettings(1, policy="static_hindsight", device=device, bits=8.0)
    result = bound(geometry, config, traces)
    assert (result.hits, result.misses, result.prefetch_transfers) == (4, 5, 1)
    assert result.stall_ms_per_token == pytest.approx((1 + 3 + 1 + 3 + 3) / 9 * TICK * 1e3)
    assert result.link_ms_per_token == pytest.approx((1 + 5) / 9 * TICK * 1e3)  # copies; 0 is moved in once
    # Carried over, host memory holds 1 and 3 when the second sequence begins.
    carried = bound(geometry, replace(config, carry_over=True), traces)
    assert carried.stall_ms_per_token == pytest.approx((1 + 3 + 1 + 3 + 1) / 9 * TICK * 1e3)
    # Reads of the warm-up do not count, but leave their mark: 3 (not counted) | 1: 3 ticks | 3: 1 tick | 5 hits.
    begun = bound(geometry, replace(config, warmup_tokens=1), [np.array([3, 1, 3, 5, 5, 5]).reshape(-1, 1, 1)])
    assert (begun.accesses, begun.misses) == (5, 2)
    assert begun.stall_ms_per_token == pytest.approx((3 + 1) / 5 * TICK * 1e3)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(2, 7),
    host=st.integers(0, 8),
    warmup=st.integers(0, 2),
    carry_over=st.booleans(),
    cold_host=st.booleans(),
    policy=st.sampled_from(["static_hindsight", "od_moe"]),
    groups=st.integers(1, 4),
    ticks=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)),
)
def test_the_clock_of_the_bounds_is_the_plain_one(
    seed, slots, host, warmup, carry_over, cold_host, policy, groups, ticks
):
    transfer, other, expert, flash = ticks
    geometry = small_geometry(2, 4, 2)
    sequences = drawn(seed, geometry)
    device = ticking(transfer, other, expert, flash, host or 0.5)
    config = ReplaySettings(slots, policy=policy, warmup_tokens=warmup, carry_over=carry_over, device=device, bits=8.0)
    result = bound(geometry, replace(config, groups=groups, cold_host=cold_host), sequences)
    kept = [experts for experts in sequences if len(experts) > warmup]
    uses = Counter((layer, int(e)) for experts in kept for t in experts[warmup:] for layer in (0, 1) for e in t[layer])
    everyone = [(layer, e) for layer in range(2) for e in range(4)]
    fixed = set(sorted(everyone, key=lambda one: (-uses[one], one))[:slots]) if policy == "static_hindsight" else set()
    at_first = [(layer, e) for e in range(4) for layer in range(2)][:host][::-1]
    at_first = [] if cold_host else at_first
    in_host, stall, counted_late, tokens = list(at_first), 0, 0, 0
    for experts in kept:
        in_host = in_host if carry_over else list(at_first)
        ends, end = [0] * groups, 0
        for place, token in enumerate(experts):
            for layer in range(2):
                loads = []
                link = ReferenceCache(Rules(2, 4, 2, [8], transfer=transfer, flash=flash, host_slots=host), [])
                link.host, arrivals = list(in_host), []
                for one in sorted((layer, int(e)) for e in token[layer]):
                    if one in fixed:
                        continue
                    loads.append(transfer + (0 if one in in_host else flash))
                    arrivals.append(link.send(one, 0))
                    in_host = [*(other_one for other_one in in_host if other_one != one), one][-host:] if host else []
                if policy == "static_hindsight":
                    waits = now = 0
                    for arrival in sorted([0] * (2 - len(arrivals)) + arrivals):
                        waits += max(0, arrival - now)
                        now = max(now, arrival) + expert
                else:  # a worker each, loading since its group computed
                    group = (place * 2 + layer) % groups
                    waits = max(0, ends[group] + max(loads) - (end + other))
                    end = ends[group] = end + other + waits + expert
                stall += waits if place >= warmup else 0
                counted_late += 2 if place >= warmup and waits else 0
            tokens += place >= warmup
    if kept:
        assert result.tokens == tokens
        assert result.stall_ms_per_token == pytest.approx(stall / tokens * TICK * 1e3)
        computing = expert * (2 if policy == "static_hindsight" else 1) + other
        assert result.compute_ms_per_token == pytest.approx(2 * computing * TICK * 1e3)
        if policy == "od_moe":
            assert (result.late_hits, result.hits) == (counted_late, result.accesses - counted_late)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(6, 9),
    host=st.integers(12, 30),
    transfer=st.integers(2, 6),
    flash=st.integers(1, 9),
)
def test_a_fixed_choice_is_no_faster_than_clairvoyant_prefetch(
    seed: int, slots: int, host: int, transfer: int, flash: int
):
    """Past the cold start, of experts that are used alike, and with the slots in which the fixed choice stages."""
    geometry = small_geometry(3, 12, 2)
    device = ticking(transfer, flash=flash, host_memory_gb=host)
    rng = np.random.default_rng(seed)
    sequences = [np.argsort(rng.random((40, 3, 12)))[..., :2] for _ in range(2)]
    common = ReplaySettings(slots, warmup_tokens=10, device=device, bits=8.0)
    fixed = bound(geometry, replace(common, policy="static_hindsight"), sequences)
    clairvoyant = Replay(geometry, replace(common, slots=slots + 2, policy="belady", prefetch="oracle"))
    for experts in sequences:
        clairvoyant.add(experts)
    assert fixed.tokens_per_second <= clairvoyant.result().tokens_per_second
    one_tier = bound(geometry, replace(common, policy="static_hindsight", device=ticking(transfer)), sequences)
    assert fixed.tokens_per_second <= one_tier.tokens_per_second


def od_moe(load: float, other: float, expert: float, groups: int, tokens: int = 8, warmup: int = 0) -> Result:
    """OD-MoE on a model of three layers, with no flash: every load takes as long."""
    geometry = small_geometry(3, 4, 2)
    device = replace(ticking(1), other_ms=other * TICK * 1e3, expert_ms=expert * TICK * 1e3)
    device = replace(device, link_gb_per_s=8 / load, link_latency_us=0)
    config = ReplaySettings(6, policy="od_moe", device=device, bits=8.0, groups=groups, warmup_tokens=warmup)
    return bound(geometry, config, [np.tile([[[0, 1]] * 3], (tokens, 1, 1))])


# Nothing waits in a running pipeline while a load takes up to G * rest + (G - 1) * expert.
@pytest.mark.parametrize(
    ("groups", "load", "other", "expert", "stall"),
    [
        (1, 1, 1, 2, 0),
        (1, 2, 1, 2, 1),  # its only group: every layer waits
        (3, 7, 1, 2, 0),
        (3, 8, 2, 1, 0),
        (3, 10, 1, 2, 1),  # three layers take 10 + 2 ticks where they would take 9: one of three waits 3
        (4, 11, 2, 1, 0),
        (4, 10, 1, 2, 0),
    ],
)
def test_od_moe_by_hand(groups: int, load: int, other: int, expert: int, stall: float):
    result = od_moe(load, other, expert, groups, tokens=28, warmup=4)
    assert result.accesses == result.prefetch_transfers == 24 * 3 * 2
    assert (result.misses, result.demand_transfers) == (0, 0)
    assert result.stall_ms_per_token == pytest.approx(3 * stall * TICK * 1e3)
    assert result.compute_ms_per_token == pytest.approx(3 * (other + expert) * TICK * 1e3)  # workers compute together
    assert result.late_hits == (0 if stall == 0 else result.accesses / min(groups, 3))
    assert result.hits == result.useful_prefetches == result.accesses - result.late_hits


def test_od_moe_begins_with_idle_workers():
    # Two groups, a load of 6, rest 1, expert 2. Layer 0: loaded at 6, through at 8. Layer 1: loaded at 6, routed at 9,
    # through at 11. Layer 2: its group began at 8, loaded at 14, through at 16.
    result = od_moe(6, 1, 2, 2, tokens=1)
    assert result.stall_ms_per_token == pytest.approx((5 + 0 + 2) * TICK * 1e3)
    assert (result.late_hits, result.hits) == (4, 2)


@given(st.floats(0.5, 20), st.floats(0.1, 5), st.floats(0.1, 5), st.integers(1, 6), st.floats(1.01, 4))
def test_od_moe_is_monotone(load: float, other: float, expert: float, groups: int, factor: float):
    here = od_moe(load, other, expert, groups).tokens_per_second
    assert od_moe(load, other * factor, expert, groups).tokens_per_second <= here * (1 + 1e-9)  # slower computing
    assert od_moe(load, other, expert * factor, groups).tokens_per_second <= here * (1 + 1e-9)
    assert od_moe(load * factor, other, expert, groups).tokens_per_second <= here * (1 + 1e-9)  # a slower link
    assert od_moe(load, other, expert, groups + 1).tokens_per_second >= here * (1 - 1e-9)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_multiply_the_speed_while_links_bind(groups: int):
    one, several = (od_moe(200, 1, 1, g, tokens=120, warmup=10).tokens_per_second for g in (1, groups))
    assert several / one == pytest.approx(groups, rel=0.02)


def test_od_moe_without_a_device():
    with pytest.raises(UserError, match="--device"):
        Bound(small_geometry(1, 4, 1), ReplaySettings(2, policy="od_moe"))


@pytest.mark.parametrize("policy", ["static_hindsight", "all_resident"])
def test_batches_and_sequences_no_longer_than_the_warmup(policy: str):
    # Batches of two: {0}+{1}, {0}+{0}; the third sequence has its own: {3}, {3}. One of one token is skipped.
    geometry = small_geometry(1, 4, 1)
    traces = [np.array(t).reshape(-1, 1, 1) for t in ([2, 0, 0], [2, 1, 0], [2], [2, 3, 3])]
    config = ReplaySettings(2, policy=policy, batch_size=2, warmup_tokens=1)
    result = bound(geometry, config, traces)
    assert result.accesses == 2 + 1 + 2
    assert result.hits == (4 if policy == "static_hindsight" else 5)  # 0 and 3, twice each
