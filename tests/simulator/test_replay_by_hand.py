"""Counts and times of traces small enough to work out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from _helpers.cache_cases import TICK, replay, scored, small_geometry, ticking

from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.steps import EventRecord
from moe_beyond.errors import UserError
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.devices import Device
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.simulator.timeline import timeline
from moe_beyond.usage_profile import UsageProfile

COLUMNS = ("hits", "misses", "demand_transfers", "prefetch_transfers", "useful_prefetches", "wasted_prefetches")
ALWAYS_ADMITTING = tuple(p for p in POLICIES if p not in ("belief", "moe_infinity", "belady_bypass", "static"))


def counts(result) -> tuple[int, ...]:
    return tuple(getattr(result, name) for name in COLUMNS)


NO_EXPERT = 255


def profile(*popularity: list[float]) -> UsageProfile:
    """Popularity by layer; every history means 1/2."""
    return UsageProfile(np.array(popularity), np.full((8, 8), 0.5))


def one_layer(trace: list[int], policy: str, popularity: list[float]) -> tuple[int, ...]:
    """Two slots, K=1; for policies that read scores, they are the popularity, before every token."""
    geometry = small_geometry(1, len(popularity), 1)
    scores = np.broadcast_to(np.float32(popularity), (len(trace), 1, 1, len(popularity))).copy()
    lookaheads = ("token",) if policy == "moe_infinity" else ()
    settings = ReplaySettings(2, policy=policy, lookaheads=lookaheads)
    return counts(replay(geometry, settings, [[[expert]] for expert in trace], scores, profile=profile(popularity)))


# Two slots: 0 0 1 1 1 2 0 2 0. The first five are M H M H H.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        # 2M drops 0 | 0M drops 1 | 2H 0H
        ("lru", 5),
        # uses: 0 twice, 1 three times | 2M drops 0 | 0M (its third use) drops 2 (one use) |
        # 2M: 0 and 1 have three uses, 1 longer ago, so 1 goes | 0H. Had 0 lost its count, it would have gone.
        ("lfu", 4),
        # 2M drops 0 | 0M drops 2 (one use) | 2M drops 0, which has one use again | 0M
        ("lfu_in_cache", 3),
        # 2M at event 6: 0 has 2 / (6 - 2 + 1), 1 has 3 / 2: drops 0 | 0M: 1 has 3/3, 2 is 1/2: drops 2 |
        # 2M: 1 has 3/4, 0 is 3/2: drops 1 | 0H
        ("lfru", 4),
        # classes: 0 has 0 (F < 2), 1 has 1 (F = 2.98). 2M: the ages are 4/1 and 1/2: drops 0 | 0M: 1 is 2/2 old and 2
        # is 1/1: a tie, 1 was used longer ago and goes | 2H 0H
        ("class_lru", 5),
        # score * T, without the layers' part: last step + 2 uses. 2M: 0 has 2 + 4, 1 has 5 + 6: drops 0 |
        # 0M: 1 has 11, 2 has 6 + 2: drops 2 | 2M: 0 has 7 + 6 = 13: drops 1 | 0H
        ("hobbit", 4),
        # 2M: 0 is needed at once, 1 never, so 1 goes | 0H 2H 0H
        ("belady", 6),
    ],
)
def test_frequency_and_recency(policy: str, hits: int):
    found = one_layer([0, 0, 1, 1, 1, 2, 0, 2, 0], policy, [0.5, 0.5, 0.5])
    assert found == (hits, 9 - hits, 9 - hits, 0, 0, 0)


# Two slots: 0 1 0 2 1 0, which all start 0M 1M 0H. In training 0 was used by 0.9 of the tokens, 1 by 0.1, 2 by 0.5.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 1),  # 2M drops 1 | 1M drops 0 | 0M drops 2
        ("lfu", 2),  # 2M drops 1 (one use) | 1M drops 2 | 0H
        ("static", 2),  # 2M drops 1 | 1M drops 2 | 0H
        ("moe_infinity", 2),  # the same, by score
        ("least_stale", 2),  # 2M: both are stale and run at the same time; 0 came in first: drops 0 | 1H | 0M
        ("belady", 2),  # 2M drops 0 (event 6; 1 is due at 5) | 1H | 0M
        ("belady_bypass", 3),  # 2M is not retained: it is not used again | 1H 0H
    ],
)
def test_who_goes_by_other_rules(policy: str, hits: int):
    found = one_layer([0, 1, 0, 2, 1, 0], policy, [0.9, 0.1, 0.5])
    assert found == (hits, 6 - hits, 6 - hits, 0, 0, 0)


@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 4),  # 2M drops 0, used before 1 | 0M
        # 0 has F = 4.9 and class 2, 1 has class 0: 2/4 is younger than 1/1. 2M drops 1 | 0H
        ("class_lru", 5),
    ],
)
def test_class_lru_slows_the_age_of_what_is_used_often(policy: str, hits: int):
    assert one_layer([0, 0, 0, 0, 0, 1, 2, 0], policy, [0.5, 0.5, 0.5])[0] == hits


# One layer, K=2, three slots: {0,1} {1,2} {0,3} {2,3}. All start MM, then 1H 2M fills the third slot, then 0H 3M:
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 4),  # 1 and 2 were used in the same event: the lowest, 1, goes | 2H 3H
        ("lfu", 3),  # 1 has two uses, 2 one: 2 goes | 3H, 2M
        ("belady", 4),  # 1 is never used again: it goes | 2H 3H
    ],
)
def test_two_experts_an_event(policy: str, hits: int):
    trace = [[[1, 0]], [[1, 2]], [[3, 0]], [[3, 2]]]  # in router order
    result = replay(small_geometry(1, 4, 2), ReplaySettings(3, policy=policy), trace)
    assert counts(result) == (hits, 8 - hits, 8 - hits, 0, 0, 0)


# Two layers a and b, K=1, three slots: a0 b0 | a1 b1 | a0 b1. All start M M | M M, with a0 b0 a1 when b1 comes.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 1),  # b1 drops a0. a0M drops b0, b1H
        ("least_stale", 2),  # of the stale, a0 runs in the next event and b0 in the event after it: b0 goes. a0H b1H
        # Of steps 1, 1, 2 and one use each, 3/T, 3/T, 4/T with T = 2; less a/L: 0 for a0 and a1, 1/2 for b0: it goes
        ("hobbit", 2),
    ],
)
def test_layers_that_run_later_leave_first(policy: str, hits: int):
    result = replay(small_geometry(2, 2, 1), ReplaySettings(3, policy=policy), [[[0], [0]], [[1], [1]], [[0], [1]]])
    assert (result.hits, result.misses) == (hits, 6 - hits)


@pytest.mark.slow
def test_moe_infinity_favours_early_layers():
    # Two slots: a0 b0 | a1 b1 | a0 b0. Scores: a0 .375, a1 .25, b0 .5 and b1 0; those of b count half.
    # a1M: a0 has .375, b0 .25: drops b0 (LRU: a0). b1M drops a1 (.25) | a0H. b0M
    scores = np.tile(np.array([[0.375, 0.25], [0.5, 0]], np.float32), (3, 1, 1, 1))
    settings = ReplaySettings(2, policy="moe_infinity", lookaheads=("token",))
    result = replay(small_geometry(2, 2, 1), settings, [[[0], [0]], [[1], [1]], [[0], [0]]], scores)
    assert (result.hits, result.misses) == (1, 5)


# Three slots, windows of six tokens that agree: a0 b0 | a0 b0 | a1 b1 | a2 b0.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        # M M | H H | a1M is the third; b1M drops a0 | a2M drops b0, b0M
        ("lru", 2),
        # After the first two windows a0 and b0 are at level 2: 6 - 0 >= 5, 6 - 1 >= 5. In the third all count as 0 when
        # b1 comes, for both layers have begun: as LRU. b0, idle, is at 1 then, b1 and a1 too. a2M: a1 is of the layer
        # that runs and counts as 0: it goes. b0H
        ("moe_spac", 3),
    ],
)
def test_moe_spac_keeps_what_windows_route_many_tokens_to(policy: str, hits: int):
    trace = [[[a], [b]] for a, b in ((0, 0), (0, 0), (1, 1), (2, 0)) for _ in range(6)]
    result = replay(small_geometry(2, 3, 1), ReplaySettings(3, policy=policy, window=6), trace)
    assert (result.accesses, result.hits) == (8, hits)


# Three slots: a0 b0 | a0 b1 | a2 b0. b0 has score 1 for the third token, all others have 0.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 1),  # M M | a0H, b1M is the third | a2M drops b0; b0M
        # The history means 1/2 always. a2M: a0, whose layer was routed just now, is due in 2 + 2 (1/2) / (1/2) = 4
        # events, b0 in 1 + 0, b1 in 1 + 2 (1 - 0) / (1/2) = 5: b1 goes. b0H
        ("belief", 2),
    ],
)
def test_belief_reads_scores(policy: str, hits: int):
    trace = [[[0], [0]], [[0], [1]], [[2], [0]]]
    assert hits_of_told(policy, "token", [[[], []], [[], []], [[], [0]]], trace) == hits


# Three slots: a0 b0 | a1 b1 | a2 b0. After b of the second token it is known that b0 has score 1 for the third.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 0),  # M M | a1M is the third; b1M drops a0 | a2M drops b0; b0M
        # b1M: a0 and a1 have score 0 for the third token and are due in 1 + 2 (1 - 0) / (1/2) = 5, b0 in 2 + 0: of a0
        # and a1 the older goes. a2M: a1, of which no more is known, is due in 2 + 2 (1/2) / (1/2) = 4, b0 in 1, b1 in
        # 1 + 4: b1 goes. b0H
        ("belief", 1),
    ],
)
def test_what_a_layer_uses_next_is_known_before_its_victims_are_chosen(policy: str, hits: int):
    trace = [[[0], [0]], [[1], [1]], [[2], [0]]]
    assert hits_of_told(policy, "next", [[[], []], [[], []], [[], [0]]], trace) == hits


def hits_of_told(policy: str, lookahead: str, told: list, trace: list) -> int:
    geometry = small_geometry(2, 3, 1)
    settings = ReplaySettings(3, policy=policy, lookaheads=(lookahead,))
    result = replay(geometry, settings, trace, scored(geometry, told), profile=profile([0.5] * 3, [0.5] * 3))
    assert result.hits + result.misses == result.accesses == 6
    return result.hits


# Two layers, two slots: a0 b0 | a0 b0. In the second token b0 has score 3/16, b1 4/16.
@pytest.mark.parametrize(("used_before", "transfers"), [(0.5, 1), (0.75, 0)])
def test_belief_does_not_fetch_what_would_be_the_worst(used_before: float, transfers: int):
    # Prefetch b1 after a0H, which is pinned: a hit of b1 takes min(1 / (4/16), 1 + 2 (12/16) / (1/2)) = 4 events. If
    # used experts are used again with 1/2, a hit of b0 takes min(1 / (3/16), 1 + 2 (13/16) / (1/2)) = 4.25: b0 is
    # evicted. With 3/4 it takes 1 + 2 (13/16) / (3/4) = 3.17: b1 is refused, also after a0, which takes
    # 2 / (3/4) = 2.67.
    scores = np.zeros((2, 1, 2, 2), np.float32)
    scores[1, 0, 1] = 0.1875, 0.25
    hazard = np.full((8, 8), used_before)
    hazard[0] = 0.5
    config = ReplaySettings(2, policy="belief", prefetch="p>0.2", lookahead=1, lookaheads=(1,))
    known = UsageProfile(np.full((2, 2), 0.5), hazard)
    result = replay(small_geometry(2, 2, 1), config, [[[0], [0]]] * 2, scores, profile=known)
    assert counts(result) == (2 - transfers, 2 + transfers, 2 + transfers, transfers, 0, transfers)


@pytest.mark.parametrize("policy", ["lru", "lfu", "hobbit", "belady", "belief"])
def test_no_victim_comes_from_the_present_demand(policy: str):
    # Two slots hold {1,2}. {0,1}: 1 is resident and computes, so 0 takes the slot of 2. One access at a time, in the
    # order of the ids, 0 would take that of 1 (the lowest of a tie), and 1 would miss.
    result = replay(small_geometry(1, 3, 2), ReplaySettings(2, policy=policy), [[[2, 1]], [[0, 1]]])
    assert counts(result) == (1, 3, 3, 0, 0, 0)


@pytest.mark.parametrize("quotas", [None, (2, 1), (1, 2)])
def test_per_layer_pools(quotas):
    # Three slots: two for layer 0 and one for layer 1, or the other way round.
    # Layer 0: 0M 1M 0H 1H with two, all M with one. Layer 1: 0M 1M 0M 0H with one, 0M 1M 0H 0H with two.
    trace = [[[0], [0]], [[1], [1]], [[0], [0]], [[1], [0]]]
    settings = ReplaySettings(3, scope="per-layer", quotas=quotas)
    result = replay(small_geometry(2, 3, 1), settings, trace)
    found = [(row["hits"], row["misses"]) for row in result.per_layer]
    assert found == ([(0, 4), (2, 2)] if quotas == (1, 2) else [(2, 2), (1, 3)])


# Two layers a and b, K=1, two global slots. Demanded: a0 b1 | a2 b1 | a0 b3. Predicted: a0 b2 | a0 b1 | a0 b3.
TRACE = [[[0], [1]], [[2], [1]], [[0], [3]]]
PREDICTED = [[[0], [2]], [[0], [1]], [[0], [3]]]
AB = small_geometry(2, 4, 1)


def replayed(**settings):
    config = {"slots": 2, "prefetch": "top1", "lookahead": 1, **settings}
    return replay(AB, ReplaySettings(**config, lookaheads=(config["lookahead"],)), TRACE, scored(AB, PREDICTED))


@pytest.mark.parametrize("lookahead", [1, "token"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # ask a0: comes. a0H, useful 1. Ask b2: comes. b1M drops a0 (oldest): b2 b1.
        # ask a0: comes, drops b2, wasted 1. a2M drops b1: a0 a2. Ask b1: comes, drops a0 (a2 computes), wasted 2.
        #   b1H, useful 2: a2 b1.
        # ask a0: comes, drops a2. a0H, useful 3. Ask b3: comes, drops b1. b3H, useful 4.
        ("lru", (4, 2, 2, 6, 4, 2)),
        # ask a0: comes (1 use). a0H (2), useful 1. Ask b2: comes (1). b1M drops b2, wasted 1: a0 b1.
        # ask a0: is there (3). a2M drops b1: a0 a2. Ask b1: comes, drops a0, which was demanded, so not wasted.
        #   b1H, useful 2: a2 b1.
        # ask a0: comes, drops a2 (1 use, b1 has 3). a0H, useful 3. Ask b3: comes, drops b1. b3H, useful 4.
        ("lfu", (4, 2, 2, 5, 4, 1)),
        # ask a0: comes. a0H, useful 1. Ask b2: comes. b1M drops b2 (never used), wasted 1: a0 b1.
        # ask a0: is there. a2M drops a0 (event 5; b1 is due at 4): b1 a2. Ask b1: is there. b1H.
        # ask a0: comes, drops a2 (neither is used again, the lowest). a0H, useful 2. Ask b3: comes, drops b1.
        #   b3H, useful 3.
        ("belady", (4, 2, 2, 4, 3, 1)),
        # ask a0: comes. a0H, useful 1. Ask b2: comes. b1M: b2 is used later (never): drops it, wasted 1: a0 b1.
        # ask a0: is there. a2M: never again, not retained. Ask b1: is there. b1H.
        # ask a0: is there. a0H. Ask b3: comes, drops b1. b3H, useful 2.
        ("belady_bypass", (4, 2, 2, 3, 2, 1)),
    ],
)
def test_prefetch(policy: str, expected: tuple[int, ...], lookahead):
    assert counts(replayed(policy=policy, lookahead=lookahead)) == expected


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_prefetch_without_the_first_layer(policy: str):
    # LRU: a0M. Ask b2: comes. b1M drops a0: b2 b1.
    #   a2M drops b2, wasted 1: b1 a2. Ask b1: is there. b1H.
    #   a0M drops a2 (event 3, b1 is of event 4): b1 a0. Ask b3: comes, drops b1. b3H, useful 1.
    # LFU: a0M (1 use). Ask b2: comes (1). b1M: a tie, a0 was used before b2 was prefetched, and goes: b2 b1.
    #   a2M: b2 goes before b1, wasted 1: b1 a2. Ask b1: is there. b1H.
    #   a0M (2) drops a2 (1 use): b1 a0. Ask b3: comes, drops b1. b3H, useful 1.
    # Belady: a0M. Ask b2: comes. b1M drops b2, wasted 1: a0 b1.
    #   a2M drops a0 (event 5): b1 a2. Ask b1: is there. b1H.
    #   a0M drops a2 (never, the lowest). Ask b3: comes, drops b1. b3H, useful 1.
    assert counts(replayed(policy=policy, first_layer_prefetch=False)) == (2, 4, 4, 2, 1, 1)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "least_stale", "hobbit", "belady"])
def test_what_finds_no_room_comes_in_when_the_experts_are_through(policy: str):
    # One slot. ask a0: comes. a0H, useful 1. Ask b2: waits for a0 to be through, comes. b1M, wasted 1.
    # ask a0: comes. a2M, wasted 2. Ask b1: comes once a2 is through. b1H, useful 2.
    # ask a0: comes. a0H, useful 3. Ask b3: comes once a0 is through. b3H, useful 4.
    assert counts(replayed(policy=policy, slots=1)) == (4, 2, 2, 6, 4, 2)


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_lookahead_zero_asks_right_before_the_event(policy: str):
    # The event before is over, so the single slot is free for every question:
    # a0: H, useful 1. b2: b1M, wasted 1. | a0: a2M, wasted 2. b1: H, useful 2. | a0: H, useful 3. b3: H, useful 4.
    assert counts(replayed(policy=policy, slots=1, lookahead=0)) == (4, 2, 2, 6, 4, 2)


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_distance_past_the_last_layer_asks_when_the_token_starts(policy: str):
    # Everything fits; both layers are prefetched before the token's first event, or not at all.
    everything = counts(replayed(policy=policy, slots=8, prefetch="top1@2", lookahead="token"))
    # a0 b2 come | a0H, b1M | a0 is there, b1 is there | a2M, b1H | a0 is there, b3 comes | a0H, b3H. b2 is wasted.
    assert everything == (4, 2, 2, 3, 2, 1)
    asks_never = {"prefetch": "top1@2", "lookahead": "token", "first_layer_prefetch": False}
    # a0M b1M | a2M b1H | a0H b3M
    assert counts(replayed(policy=policy, slots=8, **asks_never)) == (2, 4, 4, 0, 0, 0)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu_in_cache", "belady"])
def test_a_candidate_that_is_resident_counts_as_used(policy: str):
    # One layer, two slots. Ask 0: comes, 0H. Ask 1: comes, 1H. Ask 0: it is there, and so is used after 1 and more
    # often (Belady knows it is due). 2M drops 1. Ask 0: still there. 0H.
    geometry = small_geometry(1, 3, 1)
    config = ReplaySettings(2, policy=policy, prefetch="top1", lookahead="token", lookaheads=("token",))
    result = replay(geometry, config, [[[0]], [[1]], [[2]], [[0]]], scored(geometry, [[[0]], [[1]], [[0]], [[0]]]))
    assert counts(result) == (3, 1, 1, 2, 2, 0)


@pytest.mark.parametrize(("demanded", "kind"), [(0, "hits"), (1, "late_hits"), (2, "misses"), (3, "hits")])
def test_where_not_all_fit_the_best_come_in(demanded: int, kind: str):
    # Two slots. a0M. Ask b3, b0, b1 (b1 scores as b0, and of equals the lower id is better): b3 takes the free slot, b0
    # comes when a0 is through, b1 finds no room at all. b0 or b3 hits, and the other is wasted. b1 was prefetched, and
    # waits still: it is late, and its transfer is a prefetch's. b2 misses.
    scores = np.array([[[[1, 0, 0, 0], [0.5, 0.5, 0, 1]]]], np.float32)
    config = ReplaySettings(2, prefetch="top3", lookahead=1, lookaheads=(1,), first_layer_prefetch=False)
    row = replay(AB, config, [[[0], [demanded]]], scores).per_layer[1]
    assert {name: row[name] for name in ("hits", "late_hits", "misses")} == {
        "hits": 0,
        "late_hits": 0,
        "misses": 0,
        kind: 1,
    }
    assert row["prefetch_transfers"] == 2 + (kind == "late_hits")
    assert row["wasted_prefetches"] == 2 - (kind == "hits")


def test_who_finds_no_room_in_its_pool_does_not_block_another():
    # A slot a layer. Before the first event: a0 comes, a1 finds a0 prefetched before, b0 and its slot are free.
    # a1 is late (it waits still), b0 hits.
    scores = np.array([[[[1, 0.5, 0], [1, 0, 0]]]], np.float32)
    config = ReplaySettings(2, scope="per-layer", prefetch="p>0.25@2", lookahead="token", lookaheads=("token",))
    result = replay(small_geometry(2, 3, 1), config, [[[1], [0]]], scores)
    assert [(row["hits"], row["late_hits"]) for row in result.per_layer] == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("prefetch", "named"),
    [("p>0.5", {0}), ("p>0.25", {0, 1, 2}), ("top2,p>0.25", {0, 1}), ("top3,p>0.5", {0}), ("p>1", set())],
)
def test_a_threshold_is_exceeded_not_reached(prefetch: str, named: set[int]):
    geometry = small_geometry(1, 4, 1)
    scores = np.tile(np.array([0.75, 0.5, 0.5, 0.25], np.float32), (1, 1, 1, 1))
    config = ReplaySettings(4, prefetch=prefetch, lookahead="token", lookaheads=("token",))
    hits = {demanded for demanded in range(4) if replay(geometry, config, [[[demanded]]], scores).hits}
    assert hits == named
    assert replay(geometry, config, [[[3]]], scores).prefetch_transfers == len(named)


def test_warmup_leaves_out_the_first_tokens():
    # Token 0 of test_prefetch's LRU case is not counted: a0H, b1M, two prefetches, and b2's waste, prefetched then.
    assert counts(replayed(warmup_tokens=1)) == (3, 1, 1, 4, 3, 1)


def test_what_the_warmup_fetched_is_a_hit_and_no_transfer():
    # Everything fits. Token 0: ask a0, H; ask b2; b1M. Token 1: a0 is there, H; b2 is there, H.
    config = ReplaySettings(8, prefetch="top1", lookahead=1, lookaheads=(1,), warmup_tokens=1)
    result = replay(AB, config, [[[0], [1]], [[0], [2]]], scored(AB, [[[0], [2]], [[0], [2]]]))
    assert result.accesses == 2
    assert counts(result) == (2, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("warmup", [3, 4])
def test_sequences_no_longer_than_the_warmup_are_skipped(warmup: int):
    assert counts(replayed(warmup_tokens=warmup)) == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("carry_over", [False, True])
def test_a_sequence_starts_cold_unless_the_cache_is_carried_over(carry_over: bool):
    # Everything fits: a0M b1M | a2M b1H | a0H b3M. The second time the same again, or all hit.
    replaying = Replay(AB, ReplaySettings(8, carry_over=carry_over))
    for _ in range(2):
        replaying.add(np.array(TRACE))
    assert counts(replaying.result()) == ((8, 4, 4, 0, 0, 0) if carry_over else (4, 8, 8, 0, 0, 0))


@pytest.mark.parametrize("demanded", [0, 1, 2])
def test_a_warm_start_moves_the_most_popular_first_the_best_last(demanded: int):
    # Two slots of three experts, the best 1, then 2. They are counted as prefetched, also in a warm-up. 0 drops 2,
    # which came before 1.
    config = ReplaySettings(2, warm_start=True)
    trace = [[[demanded]], [[1]]]
    result = replay(small_geometry(1, 3, 1), config, trace, profile=profile([0.1, 0.9, 0.5]))
    assert counts(result) == {0: (1, 1, 1, 2, 1, 1), 1: (2, 0, 0, 2, 1, 1), 2: (2, 0, 0, 2, 2, 0)}[demanded]
    warmed = replay(
        small_geometry(1, 3, 1),
        ReplaySettings(2, warm_start=True, warmup_tokens=1),
        trace,
        profile=profile([0.1, 0.9, 0.5]),
    )
    assert (warmed.accesses, warmed.hits, warmed.prefetch_transfers) == (1, 1, 2)


def test_an_event_of_several_tokens_demands_distinct_experts():
    # Prefill in chunks of two, then decode: {0,1} + {1,2} = 3 accesses, {0,3} is a chunk of its own (the prompt has
    # three tokens), then {0,1} and {2,3}.
    trace = [[[0, 1]], [[2, 1]], [[0, 3]], [[0, 1]], [[2, 3]]]
    config = ReplaySettings(4, prefill_chunk=2)
    # MMM | HM | HH | HH
    result = replay(small_geometry(1, 4, 2), config, trace, decode_start=3)
    assert (result.accesses, result.hits, result.misses) == (9, 5, 4)
    # Without chunks {1,2} hits 1: two more accesses are not made, one hit less.
    assert replay(small_geometry(1, 4, 2), ReplaySettings(4), trace, decode_start=3).accesses == 10
    # In windows of three: {0,1,2,3}, {0,1,2,3}.
    windows = replay(small_geometry(1, 4, 2), ReplaySettings(4, window=3), trace, decode_start=3)
    assert (windows.accesses, windows.hits) == (8, 4)


def test_a_batch_demands_what_any_of_its_sequences_does():
    # {0} and {1} together, then {1} and {1}, then only the longer one's {2}; a third sequence is a batch of its own.
    replaying = Replay(small_geometry(1, 3, 1), ReplaySettings(3, batch_size=2))
    for trace in ([0, 1], [1, 1, 2], [2]):
        replaying.add(np.array(trace).reshape(-1, 1, 1))
    result = replaying.result()
    assert (result.accesses, result.hits, result.misses) == (5, 1, 4)


def test_a_batch_is_predicted_to_use_what_any_of_its_sequences_may():
    # Expert 0: 1 - (1 - .5) (1 - .5) = .75; 1: 1 - (1 - .625) (1 - 0) = .625. Both tokens use 0.
    scores = np.zeros((2, 1, 1, 1, 3), np.float32)
    scores[:, 0, 0, 0, 0] = 0.5
    scores[0, 0, 0, 0, 1] = 0.625
    config = ReplaySettings(2, batch_size=2, prefetch="p>.7", lookahead="token", lookaheads=("token",))
    replaying = Replay(small_geometry(1, 3, 1), config)
    for one in scores:
        replaying.add(np.zeros((1, 1, 1), np.int64), one)
    assert counts(replaying.result()) == (1, 0, 0, 1, 1, 0)


def test_an_expert_named_twice_in_an_event_is_refused():
    # A router names K distinct experts: counting one twice would make a hit of nothing.
    with pytest.raises(UserError, match="an expert occurs twice in one entry"):
        replay(small_geometry(1, 4, 2), ReplaySettings(2), [[[1, 1]]])


def test_scores_may_be_given_and_not_needed():
    result = replay(AB, ReplaySettings(8), TRACE, np.full((3, 1, 2, 4), 0.5, np.float32))
    assert counts(result) == (2, 4, 4, 0, 0, 0)


# The clock, in ticks. Unless stated otherwise a layer takes 1 before it is routed, an expert 1, and a transfer 3.


def clock(
    layers: int,
    trace: list[list[list[int]]],
    predicted: list[list[list[int]]] | None = None,
    slots: int = 8,
    device: Device | None = None,
    **settings,
):
    """Return the result, and the ticks at which every event was routed, had its experts, and was through."""
    geometry = small_geometry(layers, 4, len(trace[0][0]))
    config = ReplaySettings(min(slots, 4 * layers), device=device or ticking(3), bits=8.0, **settings)
    scores = None if predicted is None else scored(geometry, predicted)
    spans, log = Replay(geometry, config).watch(ReplaySequence(geometry, np.array(trace, np.uint8), scores))
    return (
        replay(geometry, config, trace, scores),
        [tuple(int(time / TICK) for time in span[:3]) for span in spans],
        [(int(row[0]), int(row[1] / TICK), int(row[2] / TICK), bool(row[3])) for row in log],
    )


def test_a_miss_waits_for_its_transfer_and_a_hit_does_not():
    # 0M: routed at 1, there at 4, through at 5. 0H: routed at 6, through at 7.
    result, spans, log = clock(1, [[[0]], [[0]]])
    assert spans == [(1, 4, 5), (6, 6, 7)]
    assert log == [(0, 1, 4, False)]
    assert result.stall_ms_per_token == 1.5 * TICK * 1e3
    assert result.compute_ms_per_token == 2 * TICK * 1e3


def test_misses_of_an_event_queue_for_the_link():
    # {0, 1}: 0 crosses from 1 to 4 and computes until 5, 1 crosses from 4 to 7 and computes until 8.
    _, spans, log = clock(1, [[[1, 0]]])
    assert spans == [(1, 7, 8)]
    assert log == [(0, 1, 4, False), (1, 4, 7, False)]


def test_residents_compute_while_a_miss_arrives():
    geometry = small_geometry(1, 12, 6)
    config = ReplaySettings(12, device=ticking(3), bits=8.0)
    trace = np.array([[[0, 1, 2, 3, 4, NO_EXPERT]], [[0, 1, 2, 3, 4, 5]], [[0, 6, 7, 8, 9, 10]]], np.uint8)
    replaying = Replay(geometry, config)
    events, _ = replaying.watch(ReplaySequence(geometry, trace))
    columns = [EventRecord.ROUTED, EventRecord.READY, EventRecord.ENDED, EventRecord.STALL]
    # Token 1: routed at 1; 5 transfers until 16, through at 17. Token 2: routed at 18; 5 is there at 21; six experts
    # compute until 24. Token 3: routed at 25; the misses are there at 28, 31, ..., 40, and the last is through at 41.
    assert (events[:, columns] / TICK).tolist() == [[1, 16, 17, 11], [18, 21, 24, 0], [25, 40, 41, 10]]
    seen = timeline(geometry, config, ReplaySequence(geometry, trace), 2, None)
    ticks = [[(round(a / TICK), round(b / TICK)) for a, b in spans] for spans in (seen.computing, seen.stalls)]
    assert ticks[0] == [(24, 25), (25, 26), (28, 29), (31, 32), (34, 35), (37, 38), (40, 41)]
    assert ticks[1] == [(26, 28), (29, 31), (32, 34), (35, 37), (38, 40)]


ONE_AHEAD = {"prefetch": "top1", "lookahead": 1, "lookaheads": (1,), "first_layer_prefetch": False}


@pytest.mark.parametrize(("lookahead", "begins"), [(1, 4), ("computed", 5)])
def test_a_late_hit_waits_for_the_rest_of_its_transfer(lookahead: int | str, begins: int):
    # a0M: routed at 1, there at 4, through at 5. b0 is prefetched at 1 and goes behind a0 at 4, or is prefetched at 5.
    # b is routed at 6: it waits for what is left.
    settings = {**ONE_AHEAD, "lookahead": lookahead, "lookaheads": (lookahead,)}
    result, spans, log = clock(2, [[[0], [0]]], [[[], [0]]], **settings)
    assert log == [(0, 1, 4, False), (4, begins, begins + 3, True)]
    assert spans == [(1, 4, 5), (6, begins + 3, begins + 4)]
    assert (result.hits, result.late_hits, result.misses) == (0, 1, 1)
    assert counts(result) == (0, 1, 1, 1, 0, 0)


def three_slices(prefetch: str, lookahead: int | str | None, device: Device):
    """Return what comes of one token of three layers that uses expert 0, which only the scores of "computed" name.

    Those of lookahead 1 name expert 1, those of "next" expert 2.
    """
    scores = np.zeros((1, 3, 3, 4), np.float32)
    for expert in range(3):
        scores[0, expert, :, expert] = 1
    config = ReplaySettings(
        12, prefetch=prefetch, lookahead=lookahead, lookaheads=("computed", 1, "next"), device=device, bits=8.0
    )
    geometry = small_geometry(3, 4, 1)
    spans, log = Replay(geometry, config).watch(ReplaySequence(geometry, np.zeros((1, 3, 1), np.uint8), scores))
    return (
        [tuple(int(time / TICK) for time in span[:3]) for span in spans],
        [(int(row[0]), int(row[1] / TICK), int(row[2] / TICK), bool(row[3])) for row in log],
    )


def test_a_prefetcher_selects_by_one_of_several_lookaheads():
    # Before the token all lookaheads give a's scores; "computed" is the nearest: a0 crosses from 0 to 3, and a is
    # through at 4. Lookahead 1 selects b1 when a is routed (1): it crosses from 3 to 6. b0 is missing at 5: from 6 to
    # 9, through at 10. It selects c1 at 5: from 9 to 12. c0 is missing at 11: from 12 to 15.
    spans, log = three_slices("top1", 1, ticking(3))
    assert spans == [(1, 3, 4), (5, 9, 10), (11, 15, 16)]
    assert log == [(0, 0, 3, True), (5, 3, 6, True), (4, 6, 9, False), (9, 9, 12, True), (8, 12, 15, False)]
    # "computed" selects b0 when a is computed (4): from 4 to 7, through at 8; then for c0: from 8 to 11.
    spans, log = three_slices("top1", "computed", ticking(3))
    assert spans == [(1, 3, 4), (5, 7, 8), (9, 11, 12)]
    assert log == [(0, 0, 3, True), (4, 4, 7, True), (8, 8, 11, True)]


def test_the_nearest_of_several_lookaheads_is_used_at_every_moment():
    # A layer takes 2 before it is routed, a transfer 1. At 0 a0, b2 and c2 are queued: a0 and b2 cross until 2. When
    # a is routed (2), b1 takes the place of b2: from 2 to 3; when it is computed (3), b0: from 3 to 4, then c2. b is
    # routed at 5 (c1: 5 to 6) and computed at 6 (c0: 6 to 7). So all three are hits.
    spans, log = three_slices("adaptive,p>0.5", None, ticking(1, other=2))
    assert spans == [(2, 2, 3), (5, 5, 6), (8, 8, 9)]
    expected = [(0, 0), (6, 1), (5, 2), (4, 3), (10, 4), (9, 5), (8, 6)]
    assert log == [(expert, begins, begins + 1, True) for expert, begins in expected]


def test_a_prefetch_that_arrives_in_time_is_a_hit():
    # A transfer takes 2: b0 crosses from 3 to 5, and is routed at 5.
    result, spans, _ = clock(2, [[[0], [0]]], [[[], [0]]], device=ticking(2), **ONE_AHEAD)
    assert spans == [(1, 3, 4), (5, 5, 6)]
    assert counts(result) == (1, 1, 1, 1, 1, 0)


def test_a_prefetch_may_take_longer_than_a_transfer_on_demand():
    # b0 is prefetched at 1, goes behind a0 at 4, and takes 3 + 2.
    slow = replace(ticking(3), prefetch_us=2 * TICK * 1e6)
    _, spans, log = clock(2, [[[0], [0]]], [[[], [0]]], device=slow, **ONE_AHEAD)
    assert log == [(0, 1, 4, False), (4, 4, 9, True)]
    assert spans == [(1, 4, 5), (6, 9, 10)]


def test_what_waits_and_is_demanded_goes_at_once_as_a_late_hit():
    # Asked for at 1: b1, then b0. b1 crosses from 4 to 7. b is routed at 6: b0 goes behind b1, from 7 to 10.
    settings = {**ONE_AHEAD, "prefetch": "top2"}
    result, spans, log = clock(2, [[[0], [0]]], [[[], [1, 0]]], **settings)
    assert log == [(0, 1, 4, False), (5, 4, 7, True), (4, 7, 10, False)]
    assert spans == [(1, 4, 5), (6, 10, 11)]
    assert (result.late_hits, *counts(result)) == (1, 0, 1, 1, 2, 0, 1)


def test_demand_goes_before_what_waits():
    # Asked for at 0: a0 (crosses from 0 to 3) and b0; after a, routed at 1, also c0. a0 is late: there at 3, through
    # at 4. b0 crosses from 3 to 6. b is routed at 5: b1 is missing, and goes from 6 to 9, before c0, which waits.
    # b is through at 10; c0 crosses from 9 to 12; c is routed at 11, waits for 1, and is through at 13.
    result, spans, log = clock(
        3, [[[0], [1], [0]]], [[[0], [0], [0]]], prefetch="top1@2", lookahead="token", lookaheads=("token",)
    )
    assert log == [(0, 0, 3, True), (4, 3, 6, True), (5, 6, 9, False), (8, 9, 12, True)]
    assert spans == [(1, 3, 4), (5, 9, 10), (11, 12, 13)]
    assert (result.late_hits, *counts(result)) == (2, 0, 1, 1, 3, 0, 1)


def test_what_was_asked_for_of_a_layer_is_dropped_at_its_event():
    # Asked for at 1: b1 (crosses from 4 to 7) and b2, which waits. b0 is missing at 6: from 7 to 10. b2 never goes.
    result, _, log = clock(2, [[[0], [0]]], [[[], [1, 2]]], **{**ONE_AHEAD, "prefetch": "top2"})
    assert log == [(0, 1, 4, False), (5, 4, 7, True), (4, 7, 10, False)]
    assert counts(result) == (0, 2, 2, 1, 0, 1)


def test_adaptive_asks_for_what_arrives_before_it_is_needed():
    # All of b is scored before the token, K=1: its best two are candidates. With a transfer of t, a0M is there at
    # 1 + t, and b is expected 2 later: two transfers of 1 fit, or one of 2, or none of 3.
    settings = {"prefetch": "adaptive", "lookaheads": ("token",), "first_layer_prefetch": False}
    for transfer, transfers in ((1, 2), (2, 1), (3, 0)):
        result, _, _ = clock(2, [[[0], [3]]], [[[], [1, 2, 0]]], device=ticking(transfer), **settings)
        assert (transfer, result.prefetch_transfers) == (transfer, transfers)


def test_adaptive_does_not_spoil_what_it_took_before():
    # A transfer takes 3, a layer 2 and an expert 2. a0M: routed at 2, there at 5, through at 7; b is expected at 9, c
    # at 13. Best-scored are c1 and c2: done at 8 and 11. b1 would be done at 8, but then c2 at 14: b1 is not
    # prefetched, and misses: routed at 9, it crosses from 11 to 14.
    scores = np.zeros((1, 1, 3, 4), np.float32)
    scores[0, 0, 1, 1], scores[0, 0, 2, 1], scores[0, 0, 2, 2] = 0.25, 1, 0.75
    config = ReplaySettings(
        8,
        prefetch="adaptive,p>0.1",
        lookaheads=("token",),
        first_layer_prefetch=False,
        device=ticking(3, other=2, expert=2),
        bits=8.0,
    )
    geometry = small_geometry(3, 4, 1)
    _, log = Replay(geometry, config).watch(ReplaySequence(geometry, np.array([[[0], [1], [2]]]), scores))
    assert (log / [1, TICK, TICK, 1]).tolist() == [[0, 2, 5, 0], [9, 5, 8, 1], [10, 8, 11, 1], [5, 11, 14, 0]]


@pytest.mark.slow
def test_hobbit_breaks_ties_exactly():
    # Three layers, four slots; a score times 12 T is 3 (R + 2 F) - a T, a + 1 the events until the layer runs.
    # -- b0M c0M | a1M b0H c1M | a2M, in step 3: b0 has 18, c1 has 12 - 3 = 9, c0 (R = 1, F = 1, a = 1) has 9 - 3 = 6,
    # a1 (R = 2, F = 1, a = 2) has 12 - 6 = 6: a tie, of which c0 was used longer ago and goes. As floats a1 has less:
    # 4 / 3 + 1 - 2 / 3 < 3 / 3 + 1 - 1 / 3. b0H c1H | a1H b0H c1H
    trace = [[[NO_EXPERT], [0], [0]], [[1], [0], [1]], [[2], [0], [1]], [[1], [0], [1]]]
    assert 4 / 3 + 1 - 2 / 3 < 3 / 3 + 1 - 1 / 3
    result = replay(small_geometry(3, 3, 1), ReplaySettings(4, policy="hobbit"), trace)
    assert [row["hits"] for row in result.per_layer] == [1, 3, 2]


@pytest.mark.parametrize(
    ("cold", "takes"),
    [
        # Host memory begins empty: 0 and 1 come from flash, 0 from host memory, 2 from flash (1 leaves host memory), 0
        # from host memory, 1 from flash.
        (True, [3, 3, 1, 3, 1, 3]),
        # It begins with 0 and 1, of which 1 would leave: 0, 1 and 0 come from host memory, 2 from flash (1 leaves), 0
        # from host memory, 1 from flash.
        (False, [1, 1, 1, 3, 1, 3]),
    ],
)
def test_two_tiers(cold: bool, takes: list[int]):
    # From host memory 1, from flash 2 more; host memory holds two, the most recently moved. One slot: 0 1 0 2 0 1.
    device = ticking(1, flash=2, host_memory_gb=2)
    result, spans, log = clock(1, [[[e]] for e in (0, 1, 0, 2, 0, 1)], slots=1, device=device, cold_host=cold)
    assert [ready - routed for routed, ready, _ in spans] == takes
    assert [end - begin for _, begin, end, _ in log] == takes
    assert result.link_ms_per_token == pytest.approx(1 * TICK * 1e3)  # copies; flash is another resource


def two_tiers(*moved: int, **settings):
    """Spans and log of one event that demands these experts; host memory holds 0 and 1. A copy takes 1, a read 3."""
    device = ticking(1, flash=3, host_memory_gb=2)
    _, spans, log = clock(1, [[[*moved]]], device=device, **settings)
    return spans, [row[:3] for row in log]


def test_flash_reads_while_the_link_copies():
    # 2 is read from 1 to 4 and copied until 5; 3 is read from 4 to 7, copied until 8, and through at 9.
    assert two_tiers(2, 3) == ([(1, 8, 9)], [(2, 1, 5), (3, 4, 8)])


def test_copies_from_host_memory_do_not_wait_for_flash():
    # 0 is copied from 1 to 2 and through at 3, while 2 is read until 4.
    assert two_tiers(0, 2) == ([(1, 5, 6)], [(0, 1, 2), (2, 1, 5)])
    # Host memory holds 0 to 3, of which 3 leaves first. There are two slots. 4 is read from 1 to 4 and copied until 5:
    # 3 leaves. 0 is copied from 7 to 8, and 1 from 10 to 11: 4 leaves its slot. At 13 the event demands 3 and 4: 3 is
    # read until 16, copied until 17 and through at 18; before that 4 is copied until 14 and through at 15.
    geometry = small_geometry(1, 5, 2)
    trace = np.array([[[4, NO_EXPERT]], [[0, NO_EXPERT]], [[1, NO_EXPERT]], [[3, 4]]], np.uint8)
    config = ReplaySettings(2, device=ticking(1, flash=3, host_memory_gb=4), bits=8.0)
    spans, log = Replay(geometry, config).watch(ReplaySequence(geometry, trace))
    assert (spans[-1, :3] / TICK).tolist() == [13, 17, 18]
    assert (log[:, :3] / [1, TICK, TICK]).tolist() == [[4, 1, 5], [0, 7, 8], [1, 10, 11], [3, 13, 17], [4, 13, 14]]


def test_the_head_comes_after_the_last_layer_and_leaves_the_link_free():
    # Two tokens, one layer, slots for all: 0 is there at 4 and through at 5; the head takes 2. 0 is routed at 8 and
    # through at 9, and the head ends at 11.
    device = replace(ticking(3), token_ms=2 * TICK * 1e3)
    result, spans, _ = clock(1, [[[0]], [[0]]], device=device)
    assert spans == [(1, 4, 5), (8, 8, 9)]
    assert (result.stall_ms_per_token, result.compute_ms_per_token) == (1.5 * TICK * 1e3, 4 * TICK * 1e3)
    seen = timeline(AB, ReplaySettings(8, device=device, bits=8.0), ReplaySequence(AB, np.array(TRACE)), 1, None)
    assert seen.computing[-1][1] - seen.computing[-1][0] == 2 * TICK
    assert seen.computing[-1][1] == seen.ends


def test_reading_the_cache_of_keys_and_values_grows_with_the_context():
    # Each token of context takes a tick in each of two layers: 1 + 1 and 1 + 2 ticks before the routing. A batch of two
    # sequences reads both: 1 + 2 and 1 + 4.
    geometry = replace(small_geometry(2, 4, 1), kv_values_per_token=int(2 * TICK * 1e9 / 2))
    config = ReplaySettings(8, device=ticking(3), bits=8.0)
    for batch, ticks in ((1, [2 * (2 + 1), 2 * (3 + 1)]), (2, [2 * (3 + 1), 2 * (5 + 1)])):
        replaying = Replay(geometry, replace(config, batch_size=batch))
        for _ in range(batch):
            replaying.add(np.zeros((2, 2, 1), np.uint8))
        assert (replaying.times.stall_compute[0][:, 1] / TICK).tolist() == ticks


def test_many_tokens_of_an_expert_take_longer_than_its_weights():
    # An expert's weights take 1 tick, and each token 1/2. Chunk of five tokens, 0 for four and 1 for one: 2.5 ticks for
    # both together, but 2 for their weights. Two tokens, 0 and 1 for one each: 2 ticks. 1 arrives while 0 computes.
    device = replace(ticking(1), tflops=2e9 / (TICK / 2) / 1e12)
    geometry = replace(small_geometry(1, 4, 1), other_params_per_layer=0)
    config = ReplaySettings(4, device=device, bits=8.0, prefill_chunk=5)
    for tokens, ticks in (([0, 0, 1, 0, 0], 1 + 2.5), ([1, 0], 1 + 2)):
        replaying = Replay(geometry, config)
        replaying.add(np.array(tokens).reshape(-1, 1, 1), None, len(tokens))
        assert (replaying.times.stall_compute[0] / TICK).tolist() == [[1, ticks]]


def test_host_memory_begins_with_as_many_of_every_layer():
    # Two layers of four experts, and host memory for three: expert 0 of both layers and expert 1 of the first come from
    # it in 1 tick, all others from flash in 3.
    geometry = small_geometry(2, 4, 1)
    config = ReplaySettings(2, device=ticking(1, flash=2, host_memory_gb=3), bits=8.0)
    for token, takes in (([[0], [0]], [1, 1]), ([[1], [1]], [1, 3]), ([[2], [3]], [3, 3])):
        spans, _ = Replay(geometry, config).watch(ReplaySequence(geometry, np.array([token])))
        assert ((spans[:, 1] - spans[:, 0]) / TICK).tolist() == takes


def test_host_memory_that_holds_all_never_reads_flash():
    traces = [[[e]] for e in (0, 1, 2, 3, 0, 2)]
    _, spans, log = clock(1, traces, slots=1, device=ticking(1))
    _, two_tiers, two_log = clock(1, traces, slots=1, device=ticking(1, flash=5, host_memory_gb=4))
    assert (two_tiers, two_log) == (spans, log)


def test_a_warm_start_takes_its_time_before_the_first_token():
    # Two transfers of 3 on an idle link: the first token starts at 6, and its hit waits for nothing.
    geometry = small_geometry(1, 3, 1)
    config = ReplaySettings(2, warm_start=True, device=ticking(3), bits=8.0)
    replaying = Replay(geometry, config, profile([0.1, 0.9, 0.5]))
    spans, log = replaying.watch(ReplaySequence(geometry, np.array([[[1]]])))
    assert (spans[:, :3] / TICK).tolist() == [[7, 7, 8]]
    assert (log[:, :3] / [1, TICK, TICK]).tolist() == [[2, 0, 3], [1, 3, 6]]
    assert replaying.times.busy == 6 * TICK
    assert [part.tolist() for part in replaying.times.stall_compute] == [[[0, 2 * TICK]]]


def test_only_decode_is_told_as_tokens_per_second():
    # K=1, four slots, transfer 3. Prompt 0 1 in a chunk: 1 + 6 (two transfers) + 1 = 8 ticks. Decode 1 2 2: hit 2,
    # miss 5, hit 2: 9 ticks for three tokens, 3 of them stall.
    geometry = small_geometry(1, 4, 1)
    config = ReplaySettings(4, device=ticking(3), bits=8.0, prefill_chunk=8)
    result = replay(geometry, config, [[[e]] for e in (0, 1, 1, 2, 2)], decode_start=2)
    assert result.prefill_ms == 8 * TICK * 1e3
    assert result.tokens_per_second == pytest.approx(3 / (9 * TICK))
    assert (result.stall_ms_per_token, result.compute_ms_per_token) == (1 * TICK * 1e3, 2 * TICK * 1e3)
    assert result.token_ms_p50 == 2 * TICK * 1e3
    assert result.bytes_per_token == 3 * 1e9 / 5
    # Without chunks the prompt's tokens are treated as if decoded: 5 + 5 + 9 ticks.
    whole = replay(geometry, ReplaySettings(4, device=ticking(3), bits=8.0), [[[e]] for e in (0, 1, 1, 2, 2)], None, 2)
    assert whole.prefill_ms is None
    assert whole.tokens_per_second == pytest.approx(5 / (19 * TICK))


def test_an_event_larger_than_the_cache_runs_in_waves():
    # Two slots, K=2, a transfer takes 3. The chunk demands 0 to 5. Routed at 1; 0 is there at 4, 1 at 7, and both are
    # through at 8; 2 and 3 are there at 11 and 14 and through at 15; 4 and 5 are there at 18 and 21 and through at 22.
    # Each wave waits for 3 ticks and for 2. Decode finds 4 and 5.
    trace = [[[0, 1]], [[2, 3]], [[4, 5]], [[4, 5]]]
    config = ReplaySettings(2, device=ticking(3), bits=8.0, prefill_chunk=3)
    geometry = small_geometry(1, 6, 2)
    replaying = Replay(geometry, config)
    events, log = replaying.watch(ReplaySequence(geometry, np.array(trace), decode_start=3))
    times = [TICK, TICK, TICK, 1, 1, 1, TICK]
    assert (events / times).tolist() == [[1, 21, 22, 0, 0, 6, 15], [23, 23, 25, 2, 0, 0, 0]]
    sent = [[0, 1, 4, 0], [1, 4, 7, 0], [2, 8, 11, 0], [3, 11, 14, 0], [4, 15, 18, 0], [5, 18, 21, 0]]
    assert (log / [1, TICK, TICK, 1]).tolist() == sent
    assert (replaying.times.stall_compute[0] / TICK).tolist() == [[15, 7], [0, 3]]
    assert counts(replay(geometry, config, trace, None, 3)) == (2, 6, 6, 0, 0, 0)


# Three slots, windows of four tokens: {4,5} | {0,1,4,5} | {0,5}. The first is M M. The second finds 4 and 5, and its
# first wave takes 0 into the free slot. The second wave is 1, with any of the others as its victim.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 3),  # 0, 4 and 5 were used in the same event: the lowest, 0, goes | 5H, 0M
        ("lfu", 3),  # 0 has one use, 4 and 5 have two: 0 goes | 5H, 0M
        ("belady", 4),  # 4 is never used again: it goes | 0H 5H
        ("belady_bypass", 4),  # there is one wave: 0 takes the free slot, 1 is not retained | 0H 5H
    ],
)
def test_a_wave_takes_its_victims_from_the_waves_before(policy: str, hits: int):
    trace = [[[expert]] for expert in (4, 4, 5, 5, 0, 1, 4, 5, 0, 5, 5, 5)]
    result = replay(small_geometry(1, 6, 1), ReplaySettings(3, policy=policy, window=4), trace)
    assert (result.accesses, result.hits, result.misses, result.demand_transfers) == (8, hits, 8 - hits, 8 - hits)


def test_waves_fill_the_pool_of_their_layer():
    # Two slots for each layer, windows of three. a: {0,1} and then 2, which takes the slot of 0; b: {0,1}. Then a:
    # {1,2} and b: {0,1}, which are all there.
    trace = [[[0], [0]], [[1], [0]], [[2], [1]], [[1], [0]], [[2], [1]], [[2], [1]]]
    result = replay(small_geometry(2, 4, 1), ReplaySettings(4, scope="per-layer", window=3), trace)
    assert [(row["hits"], row["misses"]) for row in result.per_layer] == [(2, 3), (2, 2)]


@pytest.mark.parametrize(
    ("device", "late", "spent"),
    [
        # One slot, two sequences. a: 0, then 1. b1 is prefetched once a1 is through. b: 1 hits, then 0 takes its slot.
        (None, 0, (0, 0)),
        # a is routed at 1: 0 is there at 4 and through at 5; 1 is there at 8 and through at 9, when b1 begins. b is
        # routed at 10: 1 is there at 12 and through at 13; 0 is there at 16 and through at 17.
        (ticking(3), 1, (11, 6)),
    ],
)
def test_a_prefetch_waits_for_the_last_wave(device: Device | None, late: int, spent: tuple[int, int]):
    geometry = small_geometry(2, 2, 1)
    config = ReplaySettings(
        1, prefetch="top1", lookahead=1, lookaheads=(1,), first_layer_prefetch=False, batch_size=2,
        device=device, bits=8.0,
    )  # fmt: skip
    replaying = Replay(geometry, config)
    for expert in (0, 1):
        replaying.add(np.array([[[expert], [expert]]]), scored(geometry, [[[], [1]]]))
    result = replaying.result()
    assert (result.late_hits, *counts(result)) == (late, 1 - late, 3, 3, 1, 1 - late, 0)
    kept = [(part / TICK).tolist() for part in replaying.times.stall_compute]
    assert kept == ([[list(spent)]] if device else [])  # times are kept for a device only
