"""Cache, stepped event by event, against the plain reference and against Replay."""

import subprocess
import sys

import numpy as np
import pytest
from cache_cases import Case, cases, small_geometry
from hypothesis import HealthCheck, given, settings
from reference_cache import COUNTERS, ReferenceCache, best

from moe_beyond.cache import core
from moe_beyond.cache.cache import Cache, quotas
from moe_beyond.cache.policies import POLICIES


def residents(cache: Cache, case: Case) -> set[tuple[int, int]]:
    layers, experts, _ = case.geometry.shape()
    return {(layer, expert) for layer in range(layers) for expert in range(experts) if cache.is_resident(layer, expert)}


def table(reference: ReferenceCache, layers: int) -> list[list[int]]:
    return [[reference.counts[layer][name] for name in COUNTERS] for layer in range(layers)]


def test_counters_have_the_names_of_the_design():
    assert core.COUNTERS == COUNTERS


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_moment_leaves_the_residents_of_the_reference(case: Case):
    config = case.settings
    total = np.zeros((case.geometry.num_layers, len(COUNTERS)), np.int64)
    for experts, scores in zip(case.sequences, case.scores, strict=True):
        reference = case.reference(experts)
        cache = Cache(case.geometry, config.slots, config.policy, config.scope, future=experts)
        for moment in case.moments(len(experts)):
            what, token, layer = moment
            counted = token >= config.warmup_tokens
            if what == "token":
                cache.start_token()
                reference.start_token()
            elif what == "prefetch":
                named = best(scores[token, layer].tolist(), config.names)
                came = cache.prefetch(layer, named, counted=counted)
                assert came == reference.prefetch(layer, named, counted), moment
            else:
                hits = cache.demand(layer, experts[token, layer], counted=counted)
                assert hits == reference.demand(layer, experts[token, layer].tolist(), counted), moment
            assert residents(cache, case) == reference.everyone(), moment
        cache.finish()
        reference.finish()
        assert cache.state.counters.tolist() == table(reference, case.geometry.num_layers)
        if len(experts) > config.warmup_tokens:
            total += cache.state.counters
    assert total.tolist() == case.replayed().counts.tolist()


# One layer, K=1, two slots: 0 and 1 come in and are never used again, then 2 needs a slot.
@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("lru", {0, 2}),  # 1 was used before 0
        ("lfu", {0, 2}),  # one use each, 1 before 0
        ("belady", {1, 2}),  # neither is used again: the lowest leaves
    ],
)
def test_who_leaves(policy: str, left: set[int]):
    future = np.array([1, 0, 2]).reshape(3, 1, 1)
    cache = Cache(small_geometry(1, 4, 1), 2, policy, future=future)
    for expert in (1, 0, 2):
        assert cache.demand(0, [expert]) == 0
    assert {expert for expert in range(4) if cache.is_resident(0, expert)} == left


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_of_one_event_leave_from_the_lowest(policy: str):
    # {3, 1, 2} came in together and none is used again, whatever the order the router named them in.
    future = np.array([[[3, 1, 2]], [[0, 4, 2]]])
    cache = Cache(small_geometry(1, 6, 3), 4, policy, future=future)
    cache.demand(0, [3, 1, 2])
    assert cache.demand(0, [0, 4, 2]) == 1  # 2 is demanded and stays; of 1 and 3 one must leave
    assert [cache.is_resident(0, expert) for expert in range(6)] == [True, False, True, True, True, False]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefetch_spares_the_present_event_and_what_was_asked_for_since(policy: str):
    future = np.array([[[0], [0], [0]]])
    cache = Cache(small_geometry(3, 4, 1), 3, policy, future=future)
    cache.start_token()
    cache.demand(0, [0])
    assert cache.prefetch(1, [3, 2, 1]) == 2  # beside the present expert there are two slots: the best two come in
    assert [cache.is_resident(1, expert) for expert in range(4)] == [False, False, True, True]
    assert cache.prefetch(2, [0]) == 0  # all three slots are held
    assert cache.demand(1, [0]) == 0  # the next event began: one of the three leaves
    assert cache.prefetch(2, [0, 1, 2]) == 2  # now only the present one is held
    assert cache.is_resident(1, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_new_token_holds_nothing(policy: str):
    cache = Cache(small_geometry(1, 4, 1), 1, policy, future=np.array([[[0]], [[1]]]))
    cache.demand(0, [0])
    assert cache.prefetch(0, [1]) == 0
    cache.start_token()
    assert cache.prefetch(0, [1]) == 1
    assert cache.demand(0, [1]) == 1


def test_an_event_demands_a_set():
    cache = Cache(small_geometry(1, 4, 2), 2)
    cache.demand(0, [3, 3, 1, 1])
    assert cache.state.counters[0, core.ACCESSES] == 2


FRESH = """
import sys
import numpy as np
from moe_beyond.cache.cache import Cache
from moe_beyond.geometry import Geometry

geometry = Geometry("small", (0, 1), 4, 1, 1, 1)
cache = Cache(geometry, 2, sys.argv[1], future=np.zeros((2, 2, 1), np.uint8))
print(cache.prefetch(1, [3, 0, 1]), [cache.is_resident(1, expert) for expert in range(4)])
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefetch_may_be_the_first_thing_that_happens(policy: str):
    # In a process of its own: a policy that finds nobody to evict may search for ever.
    done = subprocess.run(
        [sys.executable, "-c", FRESH, policy], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "2 [True, False, False, True]"


@pytest.mark.parametrize(
    ("slots", "scope", "pools"),
    [
        (7, "global", [7]),
        (12, "per-layer", [3, 3, 3, 3]),
        (11, "per-layer", [3, 3, 3, 2]),
        (9, "per-layer", [3, 2, 2, 2]),
    ],
)
def test_pools(slots: int, scope: str, pools: list[int]):
    assert quotas(small_geometry(4, 8, 2), slots, scope).tolist() == pools
