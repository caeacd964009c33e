"""Access by access, as other simulators count: against some in plain Python, and libcachesim."""

import heapq
from collections import OrderedDict
from pathlib import Path

import libcachesim
import numpy as np
import pytest
from _helpers.cache_cases import small_geometry
from _helpers.common import with_holes
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.settings import BOUNDS

NEVER = 2**62


def requests(geometry: Geometry, sequences: list[np.ndarray]) -> list[int]:
    """Every expert of every layer of every token, in the router's order."""
    return [
        layer * geometry.num_experts + expert
        for experts in sequences
        for token in experts.tolist()
        for layer, event in enumerate(token)
        for expert in event
        if expert >= 0
    ]


def next_uses(ids: list[int]) -> list[int]:
    following, seen = [NEVER] * len(ids), {}
    for place in reversed(range(len(ids))):
        following[place] = seen.get(ids[place], NEVER)
        seen[ids[place]] = place
    return following


def lru(ids: list[int], slots: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in ids:
        hits += expert in cache
        if expert not in cache and len(cache) == slots:
            cache.popitem(last=False)
        cache[expert] = None
        cache.move_to_end(expert)
    return hits


def lfu_in_cache(ids: list[int], slots: int) -> int:
    uses: dict[int, tuple[int, int]] = {}  # how often since it came in, and when last
    hits = 0
    for now, expert in enumerate(ids):
        hits += expert in uses
        if expert not in uses and len(uses) == slots:
            del uses[min(uses, key=uses.__getitem__)]
        uses[expert] = (uses.get(expert, (0, 0))[0] + 1, now)
    return hits


def lfu(ids: list[int], slots: int) -> int:
    uses: dict[int, tuple[int, int]] = {}  # how often, and when last, also of those that left
    cache: set[int] = set()
    hits = 0
    for now, expert in enumerate(ids):
        hits += expert in cache
        if expert not in cache and len(cache) == slots:
            cache.remove(min(cache, key=uses.__getitem__))
        cache.add(expert)
        uses[expert] = (uses.get(expert, (0, 0))[0] + 1, now)
    return hits


def belady(ids: list[int], slots: int) -> int:
    due: dict[int, int] = {}
    heap: list[tuple[int, int]] = []  # farthest first; what is out of date is skipped
    hits = 0
    for expert, following in zip(ids, next_uses(ids), strict=True):
        hits += expert in due
        if expert not in due and len(due) == slots:
            while due.get(heap[0][1]) != -heap[0][0]:
                heapq.heappop(heap)
            del due[heapq.heappop(heap)[1]]
        due[expert] = following
        heapq.heappush(heap, (-following, expert))
    return hits


def replayed(geometry: Geometry, sequences: list[np.ndarray], policy: str, slots: int, **more) -> int:
    """Hits of one stream: the cache is carried over."""
    ids = np.array(requests(geometry, sequences), np.int64)
    settings = ReplaySettings(slots, policy=policy, sequential=True, carry_over=True, **more)
    replaying = Replay(geometry, settings, stream=Stream(ids, np.arange(len(ids) + 1)))
    for experts in sequences:
        replaying.add(experts)
    result = replaying.result()
    assert result.accesses == len(ids) == result.hits + result.misses
    return result.hits


@pytest.mark.parametrize("simulate", [lru, lfu, lfu_in_cache, belady])
@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(2, 9))
def test_plain_simulators(simulate, seed: int, slots: int):
    geometry = small_geometry(2, 5, 2)
    rng = np.random.default_rng(seed)
    sequences = [np.argsort(rng.random((length, 2, 5)))[..., :2] for length in rng.integers(1, 12, 3)]
    if seed % 2:
        sequences = [with_holes(experts, rng) for experts in sequences]
    assert replayed(geometry, sequences, simulate.__name__, slots) == simulate(requests(geometry, sequences), slots)


def test_every_sequence_starts_cold_unless_carried_over():
    geometry = small_geometry(1, 4, 2)
    replaying = Replay(geometry, ReplaySettings(2, sequential=True))
    for _ in range(2):
        replaying.add(np.array([[[3, 1]], [[1, 3]], [[3, 0]]]))  # 3M 1M 1H 3H 3H 0M, twice
    assert (replaying.result().hits, replaying.result().misses) == (6, 6)
    # Carried over, the second time 3 is there and 1 not: 3H 1M 1H 3H 3H 0M
    assert replayed(geometry, [np.array([[[3, 1]], [[1, 3]], [[3, 0]]])] * 2, "lru", 2) == 7


def test_an_event_is_judged_as_a_whole_and_a_stream_is_not():
    # Two slots with {1, 2}. As an event {0, 1}: 1 is there. One by one, 0 takes the place of 2 or 1 in turn: after
    # 2, 1 the oldest is 2, and 1 hits; after 1, 2 it is 1, and 1 misses.
    geometry = small_geometry(1, 3, 2)
    for first, hits in (([2, 1], 1), ([1, 2], 0)):
        trace = [np.array([[first], [[0, 1]]])]
        assert replayed(geometry, trace, "lru", 2) == hits
        replaying = Replay(geometry, ReplaySettings(2))
        replaying.add(trace[0])
        assert replaying.result().hits == 1


@pytest.mark.parametrize(("policy", "theirs"), [("lru", "LRU"), ("lfu_in_cache", "LFU"), ("belady", "Belady")])
def test_libcachesim(policy: str, theirs: str, tmp_path: Path):
    geometry = small_geometry(4, 32, 4)
    rng = np.random.default_rng(3)
    popularity = rng.gumbel(size=(4, 32)) * 1.5  # skewed
    sequences = [np.argsort(-(popularity + rng.gumbel(size=(n, 4, 32))))[..., :4] for n in rng.integers(50, 250, 22)]
    ids = requests(geometry, sequences)
    assert 40_000 < len(ids) < 70_000
    records = np.zeros(len(ids), np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next_access", "<i8")]))
    records["time"], records["id"], records["size"] = np.arange(len(ids)), ids, 1
    records["next_access"] = [-1 if following == NEVER else following for following in next_uses(ids)]
    path = tmp_path / "stream.oracleGeneral"
    path.write_bytes(records.tobytes())
    reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    slots = 40
    miss_ratio, _ = getattr(libcachesim, theirs)(cache_size=slots).process_trace(reader)
    hits = replayed(geometry, sequences, policy, slots)
    assert hits == len(ids) - round(miss_ratio * len(ids))
    assert 0.2 < hits / len(ids) < 0.9


@pytest.mark.parametrize("policy", sorted({*POLICIES} - {"belief", "moe_spac", "moe_infinity", "static"} - {*BOUNDS}))
def test_the_optimum_of_a_stream(policy: str):
    geometry = small_geometry(3, 8, 2)
    rng = np.random.default_rng(0)
    sequences = [np.argsort(rng.random((40, 3, 8)))[..., :2] for _ in range(4)]
    bypassing = replayed(geometry, sequences, "belady_bypass", 7)
    assert replayed(geometry, sequences, policy, 7) <= bypassing
    if policy != "belady_bypass":
        assert replayed(geometry, sequences, policy, 7) <= replayed(geometry, sequences, "belady", 7) < bypassing
