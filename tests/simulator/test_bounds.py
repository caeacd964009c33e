"""What stands beside a replay: by brute force, and by its formula."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cache_cases import TICK, small_geometry, ticking
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.bounds import Bound
from moe_beyond.simulator.devices import resident_seconds
from moe_beyond.simulator.sequence import Sequence


def bound(geometry: Geometry, config: ReplaySettings, sequences: Iterable[np.ndarray]) -> Result:
    accumulating = Bound(geometry, config)
    for experts in sequences:
        accumulating.add_sequence(Sequence(geometry, experts))
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
        for begin in range(0, len(experts), window)
        if begin >= warmup
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
        tokens = sum(len(experts) for experts in sequences if len(experts) > warmup)
        skipped = sum(
            sum(
                window if begin + window <= len(experts) else len(experts) - begin
                for begin in range(0, len(experts), window)
                if begin < warmup
            )
            for experts in sequences
            if len(experts) > warmup
        )
        assert result.stall_ms_per_token == pytest.approx(result.misses * 3 * TICK * 1e3 / (tokens - skipped))


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


# G groups of K workers; a load takes ticks, an expert 2 and the rest of a layer 1: in time up to 2 G + (G - 1).
@pytest.mark.parametrize(("groups", "load", "stall"), [(1, 2, 0), (1, 3, 1), (3, 8, 0), (3, 10, 2), (4, 11, 0)])
def test_od_moe(groups: int, load: int, stall: int):
    geometry = small_geometry(3, 4, 2)
    config = ReplaySettings(6, policy="od_moe", device=ticking(load, other=1, expert=2), bits=8.0, groups=groups)
    sequences = drawn(0, geometry)
    tokens = sum(map(len, sequences))
    result = bound(geometry, config, sequences)
    assert result.accesses == result.prefetch_transfers == tokens * 3 * 2
    assert (result.hits, result.late_hits) == ((0, result.accesses) if stall else (result.accesses, 0))
    assert result.misses == result.demand_transfers == 0
    assert result.stall_ms_per_token == pytest.approx(3 * stall * TICK * 1e3)
    assert result.compute_ms_per_token == pytest.approx(3 * (1 + 2) * TICK * 1e3)  # the workers compute side by side


def test_od_moe_without_a_device():
    with pytest.raises(UserError, match="--device"):
        Bound(small_geometry(1, 4, 1), ReplaySettings(2, policy="od_moe"))


@pytest.mark.parametrize("policy", ["static_hindsight", "all_resident"])
def test_batches_and_sequences_no_longer_than_the_warmup(policy: str):
    # Batches of two: {0}+{1}, {0}+{0}; the third sequence, alone: {3}, {3}. One of one token is skipped.
    geometry = small_geometry(1, 4, 1)
    traces = [np.array(t).reshape(-1, 1, 1) for t in ([2, 0, 0], [2, 1, 0], [2], [2, 3, 3])]
    config = ReplaySettings(2, policy=policy, batch_size=2, warmup_tokens=1)
    result = bound(geometry, config, traces)
    assert result.accesses == 2 + 1 + 2
    assert result.hits == (4 if policy == "static_hindsight" else 5)  # 0 and 3, twice each
