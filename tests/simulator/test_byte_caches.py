"""Caches whose layers differ in size: counts by hand, and against a plain-Python cache that counts bytes."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.cache.core import Expert, Pool
from moe_beyond.cache.interconnect import Transfer
from moe_beyond.cache.pools import least_slots, pool_capacities
from moe_beyond.cache.steps import EventRecord
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, parse_budget
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.bounds import Bound, demand
from moe_beyond.simulator.devices import Device
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.usage_profile import UsageProfile, default_hazard


def geometry(sizes: tuple[int, ...], experts: int, top_k: int) -> Geometry:
    return Geometry(
        "mixed", tuple(range(len(sizes))), experts, top_k, 0, 0, expert_bytes=sizes, other_bytes=(0,) * len(sizes)
    )


TWO = geometry((300, 200), 4, 1)
"""Units of 100 bytes: an expert of layer 0 takes three, one of layer 1 two; all take 20."""


def hits(policy: str, budget: int, experts: list[list[int]], **more) -> list[int]:
    """Hits of each event of a sequence with one expert per layer."""
    asked = ReplaySettings(4, policy, budget_bytes=budget, **more)
    sequence = ReplaySequence(TWO, np.array(experts, np.uint8)[..., None])
    events, _ = Replay(TWO, asked).watch(sequence)
    return [int(count) for count in events[:, EventRecord.HITS]]


def test_lru_by_hand() -> None:
    # 8 units. Layer 0: A=3; layer 1: a=2; B=3 fills it. b=2 evicts A (3), and leaves one unit free. A needs three: one
    # is free and a's two make room. a needs two: B (3) goes, one unit is free. The next A and a are hits.
    assert hits("lru", 800, [[0, 0], [1, 1], [0, 0], [0, 0]]) == [0, 0, 0, 0, 0, 0, 1, 1]
    # 10 units hold A, a, B and b.
    assert hits("lru", 1000, [[0, 0], [1, 1], [0, 0], [0, 0]]) == [0, 0, 0, 0, 1, 1, 1, 1]
    # 999 bytes are nine units: b evicts A, A evicts a, and a evicts B.
    assert hits("lru", 999, [[0, 0], [1, 1], [0, 0], [0, 0]]) == [0, 0, 0, 0, 0, 0, 1, 1]


def test_a_large_expert_evicts_two_small_ones() -> None:
    # 7 units: A=3, a=2, then A again and b=2. B needs three: the least recent are a and A, and a's two do not suffice.
    assert hits("lru", 700, [[0, 0], [0, 1], [1, 1], [1, 0]]) == [0, 0, 1, 0, 0, 1, 1, 0]
    # Belady keeps b for the event after the next, and evicts what is not demanded again: A.
    assert hits("belady", 700, [[0, 0], [0, 1], [1, 1], [1, 0]]) == [0, 0, 1, 0, 0, 1, 1, 1]


def test_bytes_are_those_of_the_layers() -> None:
    device = Device("d", link_gb_per_s=1e-6, link_latency_us=0, memory_gb=1, memory_gb_per_s=1)
    asked = ReplaySettings(4, "lru", budget_bytes=1000, device=device)
    replay = Replay(TWO, asked)
    _, log = replay.watch(ReplaySequence(TWO, np.array([[[0], [0]], [[0], [1]]], np.uint8)))
    # A, a and b cross at 1000 bytes per second; A is a hit the second time.
    assert (log[:, Transfer.END] - log[:, Transfer.BEGIN]).tolist() == pytest.approx([0.3, 0.2, 0.2])
    result = replay.result()
    assert (result.hits, result.misses) == (1, 3)
    assert result.bytes_per_token == 350
    assert result.bytes_ratio == 700 / 1000
    assert (result.budget_slots, result.budget_bytes) == (4, 1000)
    assert result.to_json()["budget_bytes"] == 1000


def test_host_memory_holds_bytes() -> None:
    device = Device(
        "d", link_gb_per_s=1e-6, link_latency_us=0, memory_gb=1, memory_gb_per_s=1, host_memory_gb=500e-9,
        flash_gb_per_s=1e-6,
    )  # fmt: skip
    asked = ReplaySettings(1, "lru", budget_bytes=300, device=device, cold_host=True)
    _, log = Replay(TWO, asked).watch(ReplaySequence(TWO, np.array([[[0], [0]], [[0], [1]], [[0], [1]]], np.uint8)))
    # A and a fill host memory, and A comes from there. b evicts a, A comes from there, and so does b.
    spent = (log[:, Transfer.END] - log[:, Transfer.BEGIN]).tolist()
    assert spent == pytest.approx([0.6, 0.4, 0.3, 0.4, 0.3, 0.2])


def test_static_hindsight_goes_by_uses_per_byte() -> None:
    experts = np.array([[[0], [1]], [[0], [1]], [[0], [2]], [[1], [2]]], np.uint8)
    settings, sequence = ReplaySettings(2, "static_hindsight", budget_bytes=500), ReplaySequence(TWO, experts)
    bound = Bound(TWO, settings, demand(TWO, settings, [sequence]))
    bound.add_sequence(sequence)
    result = bound.result()
    # Uses per unit: A 3/3, layer 1's 1 and 2 have 2/2 each. A and the first of them fill five units.
    assert (result.hits, result.prefetch_transfers) == (5, 2)
    assert result.bytes_ratio == (5 + 3 + 2 + 2) / 20


def test_warm_start_fills_the_bytes() -> None:
    profile = UsageProfile(np.array([[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]]), default_hazard())
    replay = Replay(TWO, ReplaySettings(4, "lru", budget_bytes=900, warm_start=True), profile)
    replay.add(np.array([[[0], [1]]], np.uint8))
    assert (replay.result().hits, replay.result().prefetch_transfers) == (2, 4)  # 3 + 2 + 2, and 2 more fit


@pytest.mark.parametrize(
    ("text", "slots", "size"),
    [("100%", 8, 2000), ("50%", 4, 1000), ("999B", 3, 999), ("4", 4, None), ("1KiB", 4, 1024)],
)
def test_budgets(text: str, slots: int, size: int | None) -> None:
    budget = parse_budget(text, TWO)
    assert (budget.slots, budget.bytes) == (slots, size)


def test_pools_count_units() -> None:
    assert pool_capacities(TWO, 4, "global").tolist() == [10]
    assert pool_capacities(TWO, 4, "global", budget_bytes=999).tolist() == [9]
    assert pool_capacities(TWO, 4, "per-layer", budget_bytes=999).tolist() == [6, 2]  # 3 + 2, and 4 are left: 3
    assert pool_capacities(TWO, 4, "per-layer", (1, 3)).tolist() == [3, 6]
    assert (least_slots(TWO, "global"), least_slots(TWO, "per-layer")) == (2, 2)
    with pytest.raises(UserError, match=r"quotas take 1,100 bytes of a budget of 1,000"):
        pool_capacities(TWO, 4, "per-layer", (3, 1))
    with pytest.raises(UserError, match="below one event's demand of 1 experts; give at least 2 slots"):
        pool_capacities(TWO, 1, "global")


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        (ReplaySettings(4, "belady_bypass"), "policy belady_bypass compares one expert with another"),
        (ReplaySettings(4, "lru", sequential=True), "--sequential counts experts"),
    ],
)
def test_the_rest_is_refused_by_name(settings_: ReplaySettings, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Replay(TWO, settings_)


@dataclass
class ByteCache:
    """A cache in plain Python, with sets and sums, which counts the hits of every event."""

    sizes: tuple[int, ...]
    budgets: list[int]
    policy: str
    events: list[tuple[int, list[int]]]

    def run(self) -> list[int]:
        resident: set[tuple[int, int]] = set()
        last: dict[tuple[int, int], int] = {}
        uses: dict[tuple[int, int], int] = defaultdict(int)
        found = []
        for now, (layer, ids) in enumerate(self.events):
            pool = layer if len(self.budgets) > 1 else 0
            demanded = [(layer, expert) for expert in sorted(ids)]
            pinned = {expert for expert in demanded if expert in resident}
            missing = [expert for expert in demanded if expert not in resident]
            found.append(len(pinned))

            def members() -> set[tuple[int, int]]:
                return {other for other in resident if len(self.budgets) == 1 or other[0] == layer}  # noqa: B023

            def taken(experts: set[tuple[int, int]]) -> int:
                return sum(self.sizes[other[0]] for other in experts)

            def rank(expert: tuple[int, int]) -> tuple:
                later = [at for at in range(now + 1, len(self.events)) if self.events[at][0] == expert[0]]  # noqa: B023
                following = next((at for at in later if expert[1] in self.events[at][1]), 10**9)
                return {
                    "lru": (last[expert], expert), "lfu": (uses[expert], last[expert], expert),
                    "belady": (-following, expert),
                }[self.policy]  # fmt: skip

            for expert in pinned:
                last[expert], uses[expert] = now, uses[expert] + 1
            while missing:
                room = (self.budgets[pool] - taken(pinned)) // self.sizes[layer]
                for expert in missing[:room]:
                    while taken(members()) + self.sizes[layer] > self.budgets[pool]:
                        resident.remove(min(members() - pinned, key=rank))
                    resident.add(expert)
                    pinned.add(expert)
                    last[expert], uses[expert] = now, uses[expert] + 1
                missing = missing[room:]
                pinned = set() if missing else pinned
        return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, str, str, int, np.ndarray, int]:
    sizes = tuple(draw(st.lists(st.sampled_from([100, 200, 300, 500, 700]), min_size=1, max_size=3)))
    experts, top_k = draw(st.integers(2, 5)), draw(st.integers(1, 2))
    model = geometry(sizes, experts, top_k)
    scope = draw(st.sampled_from(["global", "per-layer"]))
    slots = draw(st.integers(min(least_slots(model, scope), model.total_experts), model.total_experts))
    exact = slots * sum(sizes) // len(sizes) + draw(st.integers(0, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = draw(st.integers(1, 14))
    ids = np.argsort(rng.gumbel(size=(length, len(sizes), experts)) + rng.gumbel(size=experts) * 2)[..., :top_k]
    return model, draw(st.sampled_from(["lru", "lfu", "belady"])), scope, exact, ids.astype(np.uint8), slots


@settings(max_examples=150)
@given(case=cases(), chunk=st.integers(0, 6))
def test_hits_are_those_of_a_plain_byte_cache(case: tuple, chunk: int) -> None:
    model, policy, scope, exact, ids, slots = case
    asked = ReplaySettings(slots, policy, scope, budget_bytes=exact, prefill_chunk=chunk)
    sequence = ReplaySequence(model, ids, decode_start=len(ids))
    events, _ = Replay(model, asked).watch(sequence)
    size = max(chunk, 1)
    steps = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
    demand = [(layer, sorted(set(step[:, layer].ravel().tolist()))) for step in steps for layer in range(len(ids[0]))]
    sizes = model.expert_bytes
    assert sizes is not None
    budgets = (pool_capacities(model, slots, scope, None, exact) * int(model.unit_bytes(16))).tolist()
    expected = ByteCache(sizes, budgets, policy, demand).run()
    assert [int(count) for count in events[:, EventRecord.HITS]] == expected


@settings(max_examples=60)
@given(case=cases(), prefetch=st.sampled_from(["none", "oracle", "top2"]))
def test_a_pool_never_holds_more_than_its_bytes(case: tuple, prefetch: str) -> None:
    model, policy, scope, exact, ids, slots = case
    layers, experts, _ = model.shape()
    scored = {"lookahead": 1, "lookaheads": (1,)} if prefetch == "top2" else {}
    asked = ReplaySettings(slots, policy, scope, budget_bytes=exact, prefetch=prefetch, carry_over=False, **scored)
    scores = np.random.default_rng(0).random((len(ids), 1, layers, experts)).astype(np.float32)
    replay = Replay(model, asked)
    kept = []
    start = replay._start

    def keep(*arguments: object) -> None:
        start(*arguments)
        kept.append(replay._cache)

    replay._start = keep  # type: ignore[method-assign]
    replay.add(ids, scores if scored else None)
    (cache,) = kept
    units = np.repeat(model.expert_units, experts)
    resident = cache.experts[Expert.PLACE] >= 0
    for pool, row in enumerate(cache.pools):
        members = resident & (cache.experts[Expert.POOL] == pool)
        assert 0 <= row[Pool.FREE] == row[Pool.CAPACITY] - units[members].sum()
        assert sorted(cache.residents[pool, : row[Pool.USED]]) == np.flatnonzero(members).tolist()
    counts = replay.result()
    assert counts.hits + counts.late_hits + counts.misses == counts.accesses
