"""Counts of traces small enough to work out by hand."""

import numpy as np
import pytest
from cache_cases import replay, scored, small_geometry

from moe_beyond.cache.policies import POLICIES
from moe_beyond.errors import UserError
from moe_beyond.replay import Replay, ReplaySettings

COLUMNS = ("hits", "misses", "demand_transfers", "prefetch_transfers", "useful_prefetches", "wasted_prefetches")


def counts(result) -> tuple[int, ...]:
    return tuple(getattr(result, name) for name in COLUMNS)


# One layer, K=1, two slots: 0 0 1 1 1 2 0 2 0.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        # 0M 0H 1M 1H 1H | 2M drops 0 | 0M drops 1 | 2H 0H
        ("lru", 5),
        # uses: 0 twice, 1 three times | 2M drops 0 | 0M (its third use) drops 2 (one use) |
        # 2M: 0 and 1 have three uses, 1 longer ago, so 1 goes | 0H. Had 0 lost its count, it would have gone.
        ("lfu", 4),
        # 2M: 0 is needed at once, 1 never, so 1 goes | 0H 2H 0H
        ("belady", 6),
    ],
)
def test_one_layer(policy: str, hits: int):
    trace = [[[expert]] for expert in (0, 0, 1, 1, 1, 2, 0, 2, 0)]
    result = replay(small_geometry(1, 4, 1), ReplaySettings(2, policy=policy), trace)
    assert counts(result) == (hits, 9 - hits, 9 - hits, 0, 0, 0)


# One layer, K=1, two slots: 0 1 0 2 1 0.
@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", 1),  # 0M 1M 0H | 2M drops 1 | 1M drops 0 | 0M drops 2
        ("lfu", 2),  # 0M 1M 0H | 2M drops 1 (one use) | 1M drops 2 | 0H
        ("belady", 2),  # 0M 1M 0H | 2M drops 0 (event 6; 1 is due at 5) | 1H | 0M
    ],
)
def test_one_layer_again(policy: str, hits: int):
    trace = [[[expert]] for expert in (0, 1, 0, 2, 1, 0)]
    result = replay(small_geometry(1, 3, 1), ReplaySettings(2, policy=policy), trace)
    assert counts(result) == (hits, 6 - hits, 6 - hits, 0, 0, 0)


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


@pytest.mark.parametrize("policy", POLICIES)
def test_no_victim_comes_from_the_present_demand(policy: str):
    # Two slots hold {1,2}. {0,1}: 1 is resident and computes, so 0 takes the slot of 2. One access at a time, in the
    # order of the ids, 0 would take that of 1 (the lowest of a tie), and 1 would miss.
    result = replay(small_geometry(1, 3, 2), ReplaySettings(2, policy=policy), [[[2, 1]], [[0, 1]]])
    assert counts(result) == (1, 3, 3, 0, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_per_layer_pools(policy: str):
    # Three slots: layer 0 gets two, layer 1 one. Layer 0: 0M 1M 0H 1H. Layer 1: 0M 1M 0M 0H.
    trace = [[[0], [0]], [[1], [1]], [[0], [0]], [[1], [0]]]
    result = replay(small_geometry(2, 3, 1), ReplaySettings(3, policy=policy, scope="per-layer"), trace)
    assert [(row["hits"], row["misses"]) for row in result.per_layer] == [(2, 2), (1, 3)]


# Two layers a and b, K=1, two global slots. Demanded: a0 b1 | a2 b1 | a0 b3. Predicted: a0 b2 | a0 b1 | a0 b3.
TRACE = [[[0], [1]], [[2], [1]], [[0], [3]]]
PREDICTED = [[[0], [2]], [[0], [1]], [[0], [3]]]
AB = small_geometry(2, 4, 1)


def replayed(**settings) -> tuple[int, ...]:
    config = ReplaySettings(**{"slots": 2, "prefetch": "top1", "lookahead": 1, **settings})
    return counts(replay(AB, config, TRACE, scored(AB, PREDICTED)))


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
    ],
)
def test_prefetch(policy: str, expected: tuple[int, ...], lookahead):
    assert replayed(policy=policy, lookahead=lookahead) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # a0M. Ask b2: comes. b1M drops a0: b2 b1.
        # a2M drops b2, wasted 1: b1 a2. Ask b1: is there. b1H.
        # a0M drops a2 (event 3, b1 is of event 4): b1 a0. Ask b3: comes, drops b1. b3H, useful 1.
        ("lru", (2, 4, 4, 2, 1, 1)),
        # a0M (1 use). Ask b2: comes (1). b1M: a tie, and both are of event 1, so the lowest, a0, goes: b2 b1.
        # a2M: b2 (event 1) goes before b1 (event 2), wasted 1: b1 a2. Ask b1: is there. b1H.
        # a0M (2) drops a2 (1 use): b1 a0. Ask b3: comes, drops b1. b3H, useful 1.
        ("lfu", (2, 4, 4, 2, 1, 1)),
        # a0M. Ask b2: comes. b1M drops b2, wasted 1: a0 b1.
        # a2M drops a0 (event 5): b1 a2. Ask b1: is there. b1H.
        # a0M drops a2 (never, the lowest). Ask b3: comes, drops b1. b3H, useful 1.
        ("belady", (2, 4, 4, 2, 1, 1)),
    ],
)
def test_prefetch_without_the_first_layer(policy: str, expected: tuple[int, ...]):
    assert replayed(policy=policy, first_layer_prefetch=False) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_prefetch_with_a_single_slot(policy: str):
    # Nothing can be asked for while the only slot computes, so only layer a's, before the token's first event:
    # ask a0: comes. a0H, useful 1. b1M. | ask a0: comes. a2M, wasted 1. b1M. | ask a0: comes. a0H, useful 2. b3M.
    assert replayed(policy=policy, slots=1) == (2, 4, 4, 3, 2, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_lookahead_zero_asks_right_before_the_event(policy: str):
    # The event before is over, so the single slot is free for every question:
    # a0: H, useful 1. b2: b1M, wasted 1. | a0: a2M, wasted 2. b1: H, useful 2. | a0: H, useful 3. b3: H, useful 4.
    assert replayed(policy=policy, slots=1, lookahead=0) == (4, 2, 2, 6, 4, 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_distance_past_the_last_layer_asks_when_the_token_starts(policy: str):
    # Everything fits; both layers are asked for before the token's first event, or not at all.
    everything = replayed(policy=policy, slots=8, prefetch="top1@2", lookahead="token")
    # a0 b2 come | a0H, b1M | a0 is there, b1 is there | a2M, b1H | a0 is there, b3 comes | a0H, b3H. b2 is wasted.
    assert everything == (4, 2, 2, 3, 2, 1)
    nothing = replayed(policy=policy, slots=8, prefetch="top1@2", lookahead="token", first_layer_prefetch=False)
    # a0M b1M | a2M b1H | a0H b3M
    assert nothing == (2, 4, 4, 0, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_that_is_resident_counts_as_used(policy: str):
    # One layer, two slots. Ask 0: comes, 0H. Ask 1: comes, 1H. Ask 0: it is there, and so is used after 1 and more
    # often (Belady knows it is due). 2M drops 1. Ask 0: still there. 0H.
    geometry = small_geometry(1, 3, 1)
    config = ReplaySettings(2, policy=policy, prefetch="top1", lookahead="token")
    result = replay(geometry, config, [[[0]], [[1]], [[2]], [[0]]], scored(geometry, [[[0]], [[1]], [[0]], [[0]]]))
    assert counts(result) == (3, 1, 1, 2, 2, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("demanded", "hits"), [(0, 1), (1, 0), (3, 1)])
def test_where_not_all_fit_the_best_come_in(policy: str, demanded: int, hits: int):
    # Three slots. a0M. Ask b3, b0, b1 (b1 scores as b0, and of equals the lower id is better): a0 computes, so there
    # are two slots, for b3 and b0; b2 is not named. Then b0 or b3 hits and the other is wasted, or b1 misses, and both
    # are.
    geometry = small_geometry(2, 4, 1)
    scores = np.array([[[1, 0, 0, 0], [0.5, 0.5, 0, 1]]], np.float32)
    config = ReplaySettings(3, policy=policy, prefetch="top3", lookahead=1, first_layer_prefetch=False)
    result = replay(geometry, config, [[[0], [demanded]]], scores)
    assert counts(result) == (hits, 2 - hits, 2 - hits, 2, hits, 2 - hits)


def test_warmup_leaves_out_the_first_tokens():
    # Of test_prefetch's LRU working, token 0 goes: a0H, b1M, two prefetches, and b2's waste, which was asked for then.
    assert replayed(warmup_tokens=1) == (3, 1, 1, 4, 3, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_the_warmup_fetched_is_a_hit_and_no_transfer(policy: str):
    # Everything fits. Token 0: ask a0, H; ask b2; b1M. Token 1: a0 is there, H; b2 is there, H.
    config = ReplaySettings(8, policy=policy, prefetch="top1", lookahead=1, warmup_tokens=1)
    result = replay(AB, config, [[[0], [1]], [[0], [2]]], scored(AB, [[[0], [2]], [[0], [2]]]))
    assert result.accesses == 2
    assert counts(result) == (2, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("warmup", [3, 4])
def test_sequences_no_longer_than_the_warmup_are_skipped(warmup: int):
    assert replayed(warmup_tokens=warmup) == (0, 0, 0, 0, 0, 0)


def test_every_sequence_starts_cold():
    # Everything fits: a0M b1M | a2M b1H | a0H b3M, and the second time the same again.
    replaying = Replay(AB, ReplaySettings(8))
    for _ in range(2):
        replaying.add(np.array(TRACE))
    assert counts(replaying.result()) == (4, 8, 8, 0, 0, 0)


def test_an_expert_named_twice_in_an_event_is_refused():
    # A router names K distinct experts: counting one twice would make a hit of nothing.
    with pytest.raises(UserError, match="an expert is named twice in one event"):
        replay(small_geometry(1, 4, 2), ReplaySettings(2), [[[1, 1]]])


def test_scores_may_be_given_and_not_needed():
    result = replay(AB, ReplaySettings(8), TRACE, np.full((3, 2, 4), 0.5, np.float32))
    assert counts(result) == (2, 4, 4, 0, 0, 0)
