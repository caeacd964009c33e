"""Cache, stepped event by event from Python, against Replay."""

import subprocess
import sys

import numpy as np
import pytest
from _helpers.cache_cases import Case, cases, small_geometry
from _helpers.reference_cache import COUNTERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_beyond.cache.cache import Cache
from moe_beyond.cache.core import Clock
from moe_beyond.cache.counters import COUNTERS as COUNTER_NAMES
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.pools import pool_slots, proportional_quotas
from moe_beyond.errors import UserError


def residents(cache: Cache, case: Case) -> set[tuple[int, int]]:
    layers, experts, _ = case.geometry.shape()
    return {(layer, expert) for layer in range(layers) for expert in range(experts) if cache.is_resident(layer, expert)}


def test_counters_have_the_names_of_the_design():
    assert COUNTER_NAMES == COUNTERS


def test_an_event_that_demands_nothing_is_one():
    cache = Cache(small_geometry(2, 4, 2), 4, "lru", "per-layer")
    cache.start_token()
    assert cache.demand(0, [0, 1]) == [0, 1]
    cache.computed(0, [0, 1])
    assert cache.demand(1, []) == []
    cache.computed(1, [])
    assert (cache.state.clock[Clock.EVENT], cache.state.clock[Clock.LAYER]) == (2, 1)
    assert cache.state.counters[:, Counter.ACCESSES].tolist() == [2, 0]


def stepped(case: Case, experts: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Do by hand what Replay does with a prefetch of one layer at a time; return the counters."""
    config, layers = case.settings, case.geometry.num_layers
    prefetch = config.prefetch_settings(case.geometry)
    cache = Cache(case.geometry, config.slots, config.policy, config.scope, config.quotas, case.profile, future=experts)

    def available(token: int, layer: int) -> np.ndarray:
        """What is known after a layer, or at -1 before the first."""
        fresh = np.full(scores.shape[2:], np.nan, np.float32)
        if "next" in config.lookaheads:
            if layer < 0 and token == 0:
                fresh[:] = scores[0, -1]
            elif layer >= 0 and token + 1 < len(experts):
                fresh[layer] = scores[token + 1, -1, layer]
        if config.lookahead == "token":
            if layer < 0:
                fresh[:] = scores[token, 0]
        elif layer + 1 < layers:
            fresh[layer + 1] = scores[token, 0, layer + 1]
        return fresh

    def prefetch_after(layer: int) -> None:
        """Ask for the layer after."""
        if layer + 1 < layers and (layer >= 0 or config.first_layer_prefetch):
            before = residents(cache, case)
            named = cache.best(layer + 1, prefetch.max_experts, prefetch.threshold)
            came = cache.prefetch(layer + 1, named)
            assert {(layer + 1, expert) for expert in came} == residents(cache, case) - before
            assert came == [expert for expert in named if expert in came]

    for token in range(len(experts)):
        cache.start_token()
        cache.set_scores(available(token, -1))
        prefetch_after(-1)
        for layer, demanded in enumerate(experts[token]):
            absent = sorted(expert for expert in demanded.tolist() if not cache.is_resident(layer, expert))
            known = available(token, layer) if config.available_after == "routed" else None
            assert cache.demand(layer, demanded, known) == absent
            if config.policy != "belady_bypass":
                assert all(cache.is_resident(layer, expert) for expert in demanded)
            if config.available_after == "routed":
                prefetch_after(layer)
            cache.computed(layer, demanded)
            if config.available_after == "computed":
                cache.set_scores(available(token, layer))
                prefetch_after(layer)
    cache.finish()
    return cache.state.counters


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_stepping_counts_what_replay_counts(policy: str, data: st.DataObject):
    case: Case = data.draw(cases(policies=(policy,), prefetches=("none",), plain=True, timed=False))
    size = case.geometry.num_experts
    lookahead = data.draw(st.sampled_from([1, "token"]))
    prefetch = f"top{data.draw(st.integers(1, size))}{data.draw(st.sampled_from(['', ',p>0.25']))}"
    lookaheads = (lookahead, *data.draw(st.sampled_from([(), ("next",)])))
    case = case.changed(prefetch=prefetch, lookahead=lookahead, lookaheads=lookaheads)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shapes = [(len(experts), len(lookaheads), *case.geometry.shape()[:2]) for experts in case.sequences]
    case = Case(
        case.geometry,
        case.settings,
        case.sequences,
        [(rng.integers(0, 5, shape) / 4).astype(np.float32) for shape in shapes],
        case.decode_starts,
        case.profile,
        case.ticks,
    )
    total = sum(stepped(case, *pair) for pair in zip(case.sequences, case.scores, strict=True))
    assert total.tolist() == case.replayed().counts().tolist()


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
    future = np.array([1, 0, 2]).reshape(3, 1, 1)
    cache = Cache(small_geometry(1, 4, 1), 2, policy, future=future)
    for expert in (1, 0, 2):
        assert cache.demand(0, [expert]) == [expert]
    assert {expert for expert in range(4) if cache.is_resident(0, expert)} == left


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "least_stale", "class_lru", "belady"])
def test_experts_of_one_event_leave_from_the_lowest(policy: str):
    # {3, 1, 2} came in together and none is used again, whatever the order the router named them in.
    future = np.array([[[3, 1, 2]], [[0, 4, 2]]])
    cache = Cache(small_geometry(1, 6, 3), 4, policy, future=future)
    cache.demand(0, [3, 1, 2])
    assert cache.demand(0, [0, 4, 2]) == [0, 4]  # 2 is demanded and stays; of 1 and 3 one must leave
    assert [cache.is_resident(0, expert) for expert in range(6)] == [True, False, True, True, True, False]


@pytest.mark.parametrize("policy", ["lru", "lfu", "hobbit", "belady"])
def test_a_prefetch_spares_the_present_event_and_what_was_asked_for_since(policy: str):
    future = np.array([[[0], [0], [0]]])
    cache = Cache(small_geometry(3, 4, 1), 3, policy, future=future)
    cache.start_token()
    cache.demand(0, [0])
    assert cache.prefetch(1, [3, 2, 1]) == [
        3,
        2,
    ]  # next to the present expert there are two slots: the best two come in
    assert cache.prefetch(2, [0]) == []  # all three slots are held
    cache.computed(0, [0])  # now 1 takes the slot of layer 0's expert; the last question waits still
    assert [cache.is_resident(1, expert) for expert in range(4)] == [False, True, True, True]
    assert not cache.is_resident(2, 0)


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_a_new_token_holds_nothing(policy: str):
    cache = Cache(small_geometry(1, 4, 1), 1, policy, future=np.array([[[0]], [[1]]]))
    cache.demand(0, [0])
    cache.start_token()
    assert cache.prefetch(0, [1]) == [1]
    assert cache.demand(0, [1]) == []


def test_an_event_demands_a_set():
    cache = Cache(small_geometry(1, 4, 2), 2)
    assert cache.demand(0, [3, 3, 1, 1]) == [1, 3]
    assert cache.state.counters[0, Counter.ACCESSES] == 2


def test_a_token_that_does_not_count():
    cache = Cache(small_geometry(1, 4, 1), 2)
    cache.start_token(counted=False)
    cache.prefetch(0, [1])
    cache.demand(0, [1])
    cache.start_token()
    cache.demand(0, [1])
    cache.finish()
    assert dict(zip(COUNTERS, cache.state.counters[0].tolist(), strict=True)) == {
        **dict.fromkeys(COUNTERS, 0),
        "accesses": 1,
        "hits": 1,
    }


def test_more_experts_at_once_than_slots():
    cache = Cache(small_geometry(2, 4, 1), 2, scope="per-layer")
    with pytest.raises(UserError, match="layer 1 demands 2 experts at once, more than the 1 slots"):
        cache.demand(1, [0, 3])


def test_scores_of_another_shape():
    with pytest.raises(UserError, match=r"\(2, 3\)"):
        Cache(small_geometry(2, 4, 1), 2).set_scores(np.zeros((2, 3)))


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.inf, np.nan])
def test_scores_that_are_no_probabilities(bad):
    scores = np.full((2, 4), np.nan)
    scores[1] = 0.25, bad, 0.125, 0.5
    with pytest.raises(UserError, match="layer 1"):
        Cache(small_geometry(2, 4, 1), 2).set_scores(scores)


@given(arrays(np.float32, (2, 70), elements=st.sampled_from([0.0, -0.0, 1e-42, 1e-30, 0.25, 0.5, 1.0])), st.data())
def test_the_best_are_the_best_and_of_equals_the_lowest(scores, data):
    count, threshold = data.draw(st.integers(1, 80)), data.draw(st.sampled_from([-np.inf, 0.0, 0.25, 1.0]))
    cache = Cache(small_geometry(2, 70, 1), 2)
    cache.set_scores(scores)
    expected = sorted(range(70), key=lambda expert: (-scores[1, expert], expert))
    assert cache.best(1, count, threshold) == [e for e in expected if scores[1, e] > threshold][:count]


def test_the_best_are_of_what_is_known():
    cache = Cache(small_geometry(2, 4, 1), 2)
    scores = np.full((2, 4), np.nan)
    scores[1] = 0.25, 0.5, 0.125, 0.5
    cache.set_scores(scores)
    assert cache.best(0, 3) == []
    assert cache.best(1, 3) == [1, 3, 0]
    assert cache.best(1, 3, 0.25) == [1, 3]
    cache.demand(1, [0])
    assert cache.best(1, 3) == []  # that run is over


def test_class_lru_fades_by_half_in_128_tokens():
    cache = Cache(small_geometry(1, 4, 1), 2, "class_lru")
    cache.start_token()
    cache.demand(0, [0])
    for _ in range(128):
        cache.start_token()
    cache.demand(0, [0])
    assert cache._policy.frequency[0] == 1.5


def test_moe_spac_offers_its_levels_as_scores():
    # From level s up where c - s >= 5 tokens, down where s - c >= 1, within 0..5; a score is a fifth of it.
    cache = Cache(small_geometry(1, 2, 1), 2, "moe_spac")
    levels = []
    for tokens in (4, 5, 5, 6, 0, 1, 9, 9, 9, 9, 9, 10, 20):
        cache.start_token()
        cache.demand(0, [0] * tokens + [1])
        levels.append(round(5 * cache.state.scores[0]))
    assert levels == [0, 1, 1, 2, 1, 1, 2, 3, 4, 5, 5, 5, 5]
    assert cache.best(0, 2) == [0, 1]


FRESH = """
import sys
import numpy as np
from moe_beyond.cache.cache import Cache
from moe_beyond.cache.core import Clock
from moe_beyond.geometry import Geometry
from moe_beyond.usage_profile import UsageProfile, default_hazard

geometry = Geometry("small", (0, 1), 4, 1, 1, 1)
profile = UsageProfile(np.full((2, 4), 0.25), default_hazard())
cache = Cache(geometry, 2, sys.argv[1], profile=profile, future=np.zeros((2, 2, 1), np.uint8))
print(cache.prefetch(1, [3, 0, 1]), [cache.is_resident(1, expert) for expert in range(4)])
print(cache.demand(0, [0]))
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefetch_may_be_the_first_thing_that_happens(policy: str):
    # In a process of its own: a policy that finds nobody to evict may search for ever.
    done = subprocess.run(
        [sys.executable, "-c", FRESH, policy], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["[3, 0] [True, False, False, True]", "[0]"]


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
    assert pool_slots(small_geometry(4, 8, 2), slots, scope, quotas).tolist() == pools


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(8, 32))
def test_quotas_are_pools(seed: int, slots: int):
    geometry = small_geometry(4, 8, 2)
    popularity = np.random.default_rng(seed).dirichlet(np.full(8, 0.3), 4) * 2
    quotas = proportional_quotas(geometry, slots, popularity)
    assert pool_slots(geometry, slots, "per-layer", quotas).tolist() == list(quotas)


def test_quotas_go_by_how_many_experts_a_layer_spreads_over():
    # Perplexities 8, 4, 2 and 2: of 24 slots all of layer 0's would be 12, but it has 8; the other 16 go 8 : 4 : 4.
    geometry = small_geometry(4, 8, 2)
    popularity = np.zeros((4, 8))
    for row, spread in zip(popularity, (8, 4, 2, 2), strict=True):
        row[:spread] = 2 / spread
    assert proportional_quotas(geometry, 16, popularity) == (8, 4, 2, 2)
    assert proportional_quotas(geometry, 24, popularity) == (8, 8, 4, 4)
    assert proportional_quotas(geometry, 8, popularity) == (2, 2, 2, 2)
