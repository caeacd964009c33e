"""Cache, stepped event by event from Python, against Replay."""

import subprocess
import sys

import numpy as np
import pytest
from _helpers.cache_cases import TICK, Case, cases, small_geometry
from _helpers.reference_cache import COUNTERS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_beyond.cache import Cache, available_layers, prefetch_moments
from moe_beyond.cache.cache import Wave
from moe_beyond.cache.core import Clock, Scratch
from moe_beyond.cache.counters import COUNTERS as COUNTER_NAMES
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.cache.pools import pool_capacities, proportional_quotas
from moe_beyond.cache.prefetchers import NO_THRESHOLD, PrefetcherId, scored
from moe_beyond.cache.prefetchers._inputs import PrefetchSettings
from moe_beyond.cache.steps import StepArrays, in_layers
from moe_beyond.errors import UserError
from moe_beyond.simulator import Replay
from moe_beyond.simulator.sequence import ReplaySequence

SOME_NOW = [name if name in ("lru", "belief") else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
"""All policies; most run with the slow tests, because each has to be compiled."""


def best_of(most: int, threshold: float = NO_THRESHOLD, distance: int = 1) -> PrefetchSettings:
    """Prefetch the best-scored experts of a layer."""
    return PrefetchSettings(PrefetcherId.SCORED.value, most, threshold, distance, True, 1, False, False, False)


def ask(cache: Cache, layer: int, experts: list[int], tokens: list[int] | None = None, now: float = 0.0) -> list[Wave]:
    """Step an event whose experts compute in no time; return its waves."""
    ids = np.array(experts, np.int64) + layer * cache._geometry.num_experts
    cache.demand(layer, ids, np.array(tokens or [1] * len(ids), np.int64), now)
    waves = []
    while (wave := cache.next_wave(now)) is not None:
        waves.append(wave)
    return waves


def missing(waves: list[Wave]) -> list[int]:
    return [expert for wave in waves for expert, _ in wave.transfers()]


class Driver:
    """Does from Python what Replay does, on a link that takes no time or moves one expert at a time."""

    def __init__(self, case: Case, future: Stream) -> None:
        config = case.settings
        self.case, (self.transfer, self.other, self.expert) = case, [ticks * TICK for ticks in case.ticks[:3]]
        self.cache = Cache(
            case.geometry, config.slots, config.policy, config.scope, config.quotas, case.profile, future,
            config.prefetch_settings(case.geometry), self.transfer,
        )  # fmt: skip
        self.now = self.free = 0.0
        self.transit: dict[int, float] = {}  # prefetches, and when they arrive

    def publish(self, steps: StepArrays, step: int, layer: int, *, computed: bool = False) -> None:
        """Publish the scores that become available after a layer, or at the start of a step (-1)."""
        layers, lookaheads = self.case.geometry.num_layers, self.case.settings.lookaheads
        slices = in_layers(lookaheads, layers).tolist()
        rows = np.full(steps.scores.shape[2:], np.nan, np.float32)
        available = available_layers(lookaheads, layer, layers, computed=computed, first_step=step == 0)
        for later in available.tolist():
            if later == layer:
                if step + 1 < len(steps.scores):
                    rows[later] = steps.scores[step + 1, slices.index(layers + 1), later]
            elif layer < 0:
                reaching = [
                    max(ahead, name == "computed") > later for name, ahead in zip(lookaheads, slices, strict=True)
                ]
                rows[later] = steps.scores[step, reaching.index(True), later]
            else:
                place = lookaheads.index("computed") if computed else slices.index(later - layer)
                rows[later] = steps.scores[step, place, later]
        self.cache.set_scores(rows, available)

    def queue(self, layer: int, ends: float, *, computed: bool = False) -> None:
        layers, top_k = self.case.geometry.num_layers, self.case.geometry.top_k
        ahead = np.arange(layers) - layer
        deadlines = ends + ahead * self.other + (ahead - 1) * top_k * self.expert
        self.cache.queue_prefetches(layer, deadlines, computed=computed)

    def advance(self, until: float) -> None:
        """Begin prefetches while the link is idle, and note those that arrive until then."""
        begins = max(self.free, self.now)
        while self.transfer and begins < until and (begun := self.cache.begin_prefetch(begins)) is not None:
            expert, slot = begun
            assert slot == self.cache.slot(expert)
            self.free = self.transit[expert] = begins = begins + self.transfer
        self.now = until
        for expert in [expert for expert, arrival in self.transit.items() if arrival <= until]:
            self.cache.arrived(expert)
            del self.transit[expert]

    def event(self, layer: int, ids: np.ndarray, tokens: np.ndarray, steps: StepArrays, step: int) -> list[float]:
        """Step an event; return what Replay records of it."""
        cache, routed, bypass = self.cache, self.now, self.case.settings.policy == "belady_bypass"
        residents = [expert for expert in ids.tolist() if cache.slot(expert) >= 0]
        came: list[int] = []
        cache.demand(layer, ids, tokens, self.now)
        after_routing, after_computing = prefetch_moments(self.case.settings.lookaheads)
        self.publish(steps, step, layer)
        arrivals = [max(self.now, self.transit.get(expert, 0.0)) for expert in residents]
        first, stall = True, 0.0
        while (wave := cache.next_wave(self.now)) is not None:
            assert len(wave.experts) == (len(residents) if first else 0) + len(wave.missing)
            if not bypass:
                assert wave.slots.tolist() == [cache.slot(expert) for expert in wave.experts.tolist()]
                assert len(set(wave.slots.tolist())) == len(wave.slots)
                assert all(0 <= slot < self.case.settings.slots for slot in wave.slots.tolist())
            came += missing([wave])
            for _ in wave.missing:
                self.free = max(self.free, self.now) + self.transfer
                arrivals.append(self.free)
            ends = self.now
            for arrival in sorted(arrivals):  # experts compute one after another, in the order of their arrival
                ends = max(ends, arrival) + self.expert
            stall += ends - self.now - self.expert * len(arrivals)
            if wave.last and after_routing:
                self.queue(layer, ends)
            ready = max([self.now, *arrivals])
            self.advance(ends)
            arrivals, first = [], False
        assert came == sorted(set(ids.tolist()) - set(residents))  # each once, ascending
        if after_computing:
            self.publish(steps, step, layer, computed=True)
            self.queue(layer, ends, computed=True)
        return [routed, ready, ends, *cache.event_counts()[:3], stall]

    def run(self, steps: StepArrays) -> list[list[float]]:
        layers, events = self.case.geometry.num_layers, []
        for step, counted in enumerate(steps.counted.tolist()):
            self.cache.start_step(counted=counted)
            self.publish(steps, step, -1)
            self.queue(-1, self.now)
            for layer in range(layers):
                self.advance(self.now + self.other)
                demanded = slice(*steps.offsets[step * layers + layer : step * layers + layer + 2])
                events.append(self.event(layer, steps.ids[demanded], steps.tokens[demanded], steps, step))
        return events


def agree(case: Case) -> None:
    """Compare every event of every sequence, and the counters of each layer."""
    config = case.settings
    replaying = Replay(case.geometry, config, case.profile, case.stream() if config.carry_over else None)
    driver, total = None, np.zeros((case.geometry.num_layers, len(COUNTERS)), np.int64)
    for experts, scores, start in zip(case.sequences, case.scores, case.decode_starts, strict=True):
        if len(experts) <= config.warmup_tokens:
            continue
        sequence = ReplaySequence(case.geometry, experts, scores if config.lookaheads else None, start)
        group = sequence.as_group(config)
        if driver is None or not config.carry_over:
            driver = Driver(case, case.stream() if config.carry_over else group.stream)
        expected, _ = replaying.watch(sequence)
        assert driver.run(group.steps(config)) == expected.tolist()
        if not config.carry_over:
            driver.cache.finish()
            total += driver.cache.state.counters
    if config.carry_over and driver is not None:
        driver.cache.finish()
        total = driver.cache.state.counters
    assert total.tolist() == replaying.counts().tolist()


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("policy", SOME_NOW)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_events_are_those_of_a_replay(policy: str, timed: bool, data: st.DataObject):
    case: Case = data.draw(cases(policies=(policy,), timed=timed))
    assume(0 not in case.settings.lookaheads)  # known only when its own layer is routed
    case = case.changed(warm_start=False, batch_size=1)
    transfer, other, expert, _, _ = case.ticks
    agree(case.with_ticks(transfer, other, expert) if case.settings.device else case)


def test_counters_have_the_names_of_the_design():
    assert COUNTER_NAMES == COUNTERS


def test_an_event_that_demands_nothing_is_one():
    cache = Cache(small_geometry(2, 4, 2), 4, "lru", "per-layer")
    cache.start_step()
    assert missing(ask(cache, 0, [0, 1])) == [0, 1]
    [wave] = ask(cache, 1, [])
    assert (wave.experts.tolist(), wave.slots.tolist(), wave.missing.tolist(), wave.last) == ([], [], [], True)
    assert (cache.state.clock[Clock.EVENT], cache.state.clock[Clock.LAYER]) == (2, 1)
    assert cache.state.counters[:, Counter.ACCESSES].tolist() == [2, 0]


def test_waves_and_their_slots():
    # Two pools of two slots: layer 1 has the slots 2 and 3. {1,2} | {0,1,2,3}: 1 and 2 compute first, then 0 and 3.
    cache = Cache(small_geometry(2, 4, 2), 4, "lru", "per-layer")
    [wave] = ask(cache, 1, [1, 2])
    assert (wave.experts.tolist(), wave.slots.tolist(), wave.transfers()) == ([5, 6], [2, 3], [(5, 2), (6, 3)])
    first, second = ask(cache, 1, [0, 1, 2, 3])
    assert (first.experts.tolist(), first.slots.tolist(), first.missing.tolist(), first.last) == (
        [5, 6], [2, 3], [], False,
    )  # fmt: skip
    assert (second.experts.tolist(), second.slots.tolist(), second.missing.tolist(), second.last) == (
        [4, 7], [2, 3], [0, 1], True,
    )  # fmt: skip
    assert cache.event_counts() == (2, 0, 2, 0)
    assert [cache.slot(expert) for expert in range(8)] == [-1, -1, -1, -1, 2, -1, -1, 3]


def test_a_prefetch_in_transit_is_a_late_hit():
    # Three slots, transfers of 3 s. b0 and b1 are queued: b0 begins at 1, b1 at 5. At 6 b0 has arrived, b1 has not.
    cache = Cache(small_geometry(2, 4, 2), 3, prefetch=best_of(2), transfer_seconds=3.0)
    scores = np.zeros((2, 4), np.float32)
    scores[1] = 0.5, 0.25, 0, 0
    cache.start_step()
    cache.demand(0, np.array([2]), np.array([1]), 1.0)
    cache.set_scores(scores, available_layers((1,), 0, 2))
    [(expert, slot)] = cache.next_wave(1.0).transfers()
    cache.queue_prefetches(0)
    assert cache.begin_prefetch(1.0) == (4, 1)
    assert cache.next_wave(4.0) is None
    cache.arrived(4)
    assert cache.begin_prefetch(5.0) == (5, 2)
    assert cache.begin_prefetch(5.0) is None
    assert missing(ask(cache, 1, [0, 1], now=6.0)) == []
    assert cache.event_counts() == (1, 1, 0, 0)
    assert (expert, slot) == (2, 0)


def test_what_is_demanded_and_waits_is_cancelled():
    # Two slots, which {2,3} of a hold while they compute; b0 and b1 wait. b: 0 is late, and nothing else begins.
    cache = Cache(small_geometry(2, 4, 2), 2, prefetch=best_of(2), transfer_seconds=3.0)
    cache.start_step()
    cache.demand(0, np.array([2, 3]), np.array([1, 1]))
    cache.set_scores(np.float32([[0, 0, 0, 0], [0.5, 0.25, 0, 0]]), np.array([1]))
    cache.next_wave()
    cache.queue_prefetches(0)
    assert cache.begin_prefetch() is None
    assert cache.next_wave() is None
    assert missing(ask(cache, 1, [0])) == [4]
    assert cache.event_counts() == (0, 1, 0, 0)
    assert cache.begin_prefetch() is None


@pytest.mark.parametrize(
    ("lookaheads", "layer", "computed", "first_step", "layers"),
    [
        ((1,), -1, False, False, [0]),
        ((1,), 1, False, False, [2]),
        ((1,), 3, False, False, []),
        ((1, 3), 0, False, False, [3, 1]),  # the farthest first
        ((1, 3), -1, False, False, [1, 2, 0]),
        (("token",), -1, False, False, [0, 1, 2, 3]),
        (("token",), 0, False, False, []),
        ((2, "next"), -1, False, True, [2, 3, 0, 1]),
        ((2, "next"), -1, False, False, [0, 1]),
        ((2, "next"), 1, False, False, [1, 3]),
        ((0,), 1, False, False, []),
        (("computed",), -1, False, False, [0]),
        (("computed",), 1, False, False, []),
        (("computed",), 1, True, False, [2]),
        (("computed",), 3, True, False, []),
        (("computed", 1, 2, "next"), -1, False, True, [2, 3, 1, 0]),  # each layer by the first that reaches it
        (("computed", 1, 2, "next"), 1, False, False, [1, 3, 2]),
        (("computed", 1, 2, "next"), 1, True, False, [2]),
        ((0, "computed"), 1, True, False, [2]),
        ((), 1, False, False, []),
    ],
)
def test_layers_whose_scores_become_available(
    lookaheads, layer: int, computed: bool, first_step: bool, layers: list[int]
):
    assert available_layers(lookaheads, layer, 4, computed=computed, first_step=first_step).tolist() == layers


def test_prefetches_follow_the_moments_of_scores():
    moments = {(): (True, False), (0,): (True, False), (1, "next"): (True, False), ("computed",): (False, True)}
    moments |= {(0, "computed"): (False, True), ("computed", 2): (True, True), ("computed", "next"): (True, True)}
    assert {lookaheads: prefetch_moments(lookaheads) for lookaheads in moments} == moments


# One layer, K=1, two slots: 0 and 1 come in and are never used again, then 2 needs a slot.
@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("lru", {0, 2}),  # 1 was used before 0
        ("lfu", {0, 2}),  # one use each, 1 before 0
        ("belady", {1, 2}),  # neither is used again: the lowest leaves
        ("belady_bypass", {0, 1}),  # 2 is not used again either: it is not retained
    ],
)
def test_who_leaves(policy: str, left: set[int]):
    geometry = small_geometry(1, 4, 1)
    future = Stream.of_tokens(geometry, np.array([1, 0, 2]).reshape(3, 1, 1))
    cache = Cache(geometry, 2, policy, future=future)
    for expert in (1, 0, 2):
        assert missing(ask(cache, 0, [expert])) == [expert]
    assert {expert for expert in range(4) if cache.slot(expert) >= 0} == left


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "least_stale", "class_lru", "belady"])
def test_experts_of_one_event_leave_from_the_lowest(policy: str):
    # {3, 1, 2} came in together and none is used again, whatever the order the router named them in.
    geometry = small_geometry(1, 6, 3)
    future = Stream.of_tokens(geometry, np.array([[[3, 1, 2]], [[0, 4, 2]]]))
    cache = Cache(geometry, 4, policy, future=future)
    ask(cache, 0, [1, 2, 3])
    assert missing(ask(cache, 0, [0, 2, 4])) == [0, 4]  # 2 is demanded and stays; of 1 and 3 one must leave
    assert [cache.slot(expert) >= 0 for expert in range(6)] == [True, False, True, True, True, False]


def test_a_token_that_does_not_count():
    cache = Cache(small_geometry(1, 4, 1), 2, prefetch=best_of(1))
    cache.start_step(counted=False)
    cache.set_scores(np.float32([[0, 1, 0, 0]]))
    cache.queue_prefetches(-1)
    ask(cache, 0, [1])
    cache.start_step()
    ask(cache, 0, [1])
    cache.finish()
    assert dict(zip(COUNTERS, cache.state.counters[0].tolist(), strict=True)) == {
        **dict.fromkeys(COUNTERS, 0),
        "accesses": 1,
        "hits": 1,
    }


@pytest.mark.parametrize(
    ("layer", "experts", "tokens"),
    [(1, [0, 3], [1, 1]), (0, [3, 0], [1, 1]), (0, [1, 1], [1, 1]), (0, [3, 4], [1, 1]), (2, [8], [1]), (-1, [-1], [1]),
     (0, [0, 1], [1]), (0, [0.0, 1.0], [1, 1])],
)  # fmt: skip
def test_a_demand_that_is_none(layer: int, experts: list, tokens: list[int]):
    cache = Cache(small_geometry(2, 4, 1), 2)
    with pytest.raises(ValueError, match="must be"):
        cache.demand(layer, np.array(experts), np.array(tokens))
    assert cache.state.clock[Clock.EVENT] == 0


@pytest.mark.parametrize("array", [np.arange(8, dtype=np.int32), np.arange(8)[::2], np.arange(8).reshape(2, 4)])
def test_an_array_that_machine_code_would_misread(array: np.ndarray):
    with pytest.raises(ValueError, match="contiguous and int64"):
        Cache(small_geometry(1, 8, 1), 2).demand(0, array, np.ones(len(array), np.int64))


def test_scores_of_another_shape():
    with pytest.raises(UserError, match=r"\(2, 3\)"):
        Cache(small_geometry(2, 4, 1), 2).set_scores(np.zeros((2, 3)))


def test_scores_of_no_layer():
    with pytest.raises(UserError, match="no layer 2"):
        Cache(small_geometry(2, 4, 1), 2).set_scores(np.zeros((2, 4)), np.array([0, 2]))


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.inf, np.nan])
def test_scores_that_are_no_probabilities(bad):
    scores = np.full((2, 4), 0.5)
    scores[1] = 0.25, bad, 0.125, 0.5
    cache = Cache(small_geometry(2, 4, 1), 2)
    with pytest.raises(UserError, match="layer 1"):
        cache.set_scores(scores)
    assert np.isnan(cache.state.scores).all()


def best(cache: Cache, layer: int, most: int, threshold: float = NO_THRESHOLD) -> list[int]:
    end = scored.best_of_layer(cache.state, best_of(most, threshold), layer, 0)
    return (cache.state.scratch_int[Scratch.SELECTED, :end] - layer * cache._geometry.num_experts).tolist()


@given(arrays(np.float32, (2, 70), elements=st.sampled_from([0.0, -0.0, 1e-42, 1e-30, 0.25, 0.5, 1.0])), st.data())
def test_the_best_are_the_best_and_of_equals_the_lowest(scores, data):
    count, threshold = data.draw(st.integers(1, 80)), data.draw(st.sampled_from([-np.inf, 0.0, 0.25, 1.0]))
    cache = Cache(small_geometry(2, 70, 1), 2)
    cache.set_scores(scores)
    expected = sorted(range(70), key=lambda expert: (-scores[1, expert], expert))
    assert best(cache, 1, count, threshold) == [e for e in expected if scores[1, e] > threshold][:count]


def test_the_best_are_of_what_is_known():
    cache = Cache(small_geometry(2, 4, 1), 2)
    scores = np.full((2, 4), np.nan)
    scores[1] = 0.25, 0.5, 0.125, 0.5
    cache.set_scores(scores)
    assert best(cache, 0, 3) == []
    assert best(cache, 1, 3) == [1, 3, 0]
    assert best(cache, 1, 3, 0.25) == [1, 3]
    ask(cache, 1, [0])
    assert best(cache, 1, 3) == []  # that run is over


@pytest.mark.slow
def test_class_lru_fades_by_half_in_128_tokens():
    cache = Cache(small_geometry(1, 4, 1), 2, "class_lru")
    cache.start_step()
    ask(cache, 0, [0])
    for _ in range(128):
        cache.start_step()
    ask(cache, 0, [0])
    assert cache.arrays.frequency[0] == 1.5


@pytest.mark.slow
def test_moe_spac_offers_its_levels_as_scores():
    # From level s up where c - s >= 5 tokens, down where s - c >= 1, within 0..5; a score is a fifth of it.
    cache = Cache(small_geometry(1, 2, 1), 2, "moe_spac")
    levels = []
    for tokens in (4, 5, 5, 6, 0, 1, 9, 9, 9, 9, 9, 10, 20):
        cache.start_step()
        ask(cache, 0, *(([0, 1], [tokens, 1]) if tokens else ([1], [1])))
        levels.append(round(5 * cache.state.scores[0]))
    assert levels == [0, 1, 1, 2, 1, 1, 2, 3, 4, 5, 5, 5, 5]
    assert best(cache, 0, 2) == [0, 1]


FRESH = """
import sys
import numpy as np
from moe_beyond.cache import Cache
from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.cache.prefetchers import NO_THRESHOLD, PrefetcherId
from moe_beyond.cache.prefetchers._inputs import PrefetchSettings
from moe_beyond.geometry import Geometry
from moe_beyond.usage_profile import UsageProfile, default_hazard

geometry = Geometry("small", (0, 1), 4, 1, 1, 1)
profile = UsageProfile(np.full((2, 4), 0.25), default_hazard())
future = Stream.of_tokens(geometry, np.zeros((2, 2, 1), np.uint8))
best = PrefetchSettings(PrefetcherId.SCORED.value, 3, NO_THRESHOLD, 2, True, 1, False, False, False)
cache = Cache(geometry, 2, sys.argv[1], profile=profile, future=future, prefetch=best)
cache.set_scores(np.array([[np.nan] * 4, [0.5, 0.25, 0, 1]]))
cache.queue_prefetches(-1)
print([cache.slot(expert) for expert in range(8)])
cache.demand(0, np.array([0]), np.array([1]))
print(cache.next_wave().transfers())
"""


@pytest.mark.parametrize("policy", SOME_NOW)
def test_a_prefetch_may_be_the_first_thing_that_happens(policy: str):
    # In a process of its own: a policy that finds nobody to evict may search for ever.
    done = subprocess.run(
        [sys.executable, "-c", FRESH, policy], capture_output=True, text=True, timeout=120, check=True
    )
    slots, transfers = done.stdout.splitlines()
    assert slots == "[-1, -1, -1, -1, 1, -1, -1, 0]"
    assert transfers in ("[(0, 0)]", "[(0, 1)]", "[(0, -1)]")


@pytest.mark.parametrize(
    ("slots", "scope", "quotas", "pools"),
    [
        (7, "global", None, [7]),
        (12, "per-layer", None, [3, 3, 3, 3]),
        (11, "per-layer", None, [3, 3, 3, 2]),
        (9, "per-layer", None, [3, 2, 2, 2]),
        (13, "per-layer", (2, 4, 5, 2), [2, 4, 5, 2]),
    ],
)
def test_pools(slots: int, scope: str, quotas, pools: list[int]):
    assert pool_capacities(small_geometry(4, 8, 2), slots, scope, quotas).tolist() == pools


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(8, 32))
def test_quotas_are_pools(seed: int, slots: int):
    geometry = small_geometry(4, 8, 2)
    popularity = np.random.default_rng(seed).dirichlet(np.full(8, 0.3), 4) * 2
    quotas = proportional_quotas(geometry, slots, popularity)
    assert pool_capacities(geometry, slots, "per-layer", quotas).tolist() == list(quotas)


def test_quotas_go_by_how_many_experts_a_layer_spreads_over():
    # Perplexities 8, 4, 2 and 2: of 24 slots all of layer 0's would be 12, but it has 8; the other 16 go 8 : 4 : 4.
    geometry = small_geometry(4, 8, 2)
    popularity = np.zeros((4, 8))
    for row, spread in zip(popularity, (8, 4, 2, 2), strict=True):
        row[:spread] = 2 / spread
    assert proportional_quotas(geometry, 16, popularity) == (8, 4, 2, 2)
    assert proportional_quotas(geometry, 24, popularity) == (8, 8, 4, 4)
    assert proportional_quotas(geometry, 8, popularity) == (2, 2, 2, 2)
