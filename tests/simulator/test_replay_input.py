"""Mistakes of a user, and the one line that names each."""

import gc
import weakref

import numpy as np
import pytest
from _helpers.cache_cases import small_geometry, ticking

from moe_beyond.cache.cache import Cache
from moe_beyond.cache.policies import POLICIES
from moe_beyond.errors import UserError
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.usage_profile import UsageProfile, default_hazard

GEOMETRY = small_geometry(3, 8, 2)
EXPERTS = np.array([[[0, 1], [2, 3], [4, 5]]] * 4, np.uint8)


def complaint(caught: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which must be one line."""
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("policy", "near"),
    [("lur", "'lru'"), ("lfuu", "'lfu'"), ("belody", "'belady'"), ("xyz", ", ".join(sorted(POLICIES)))],
)
def test_unknown_policy(policy: str, near: str):
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8, policy=policy))
    assert repr(policy) in complaint(caught)
    assert near in complaint(caught)
    with pytest.raises(UserError) as caught_by_the_cache:
        Cache(GEOMETRY, 8, policy)
    assert complaint(caught_by_the_cache) == complaint(caught)


@pytest.mark.parametrize("scope", ["layer", "per_layer", "Global", ""])
def test_unknown_scope(scope: str):
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8, scope=scope))
    assert repr(scope) in complaint(caught)
    assert "'global'" in complaint(caught)
    assert "'per-layer'" in complaint(caught)
    with pytest.raises(UserError):
        Cache(GEOMETRY, 8, scope=scope)


@pytest.mark.parametrize(
    ("slots", "scope", "need"),
    [(1, "global", 2), (0, "global", 2), (-3, "global", 2), (5, "per-layer", 6), (2, "per-layer", 6)],
)
def test_fewer_slots_than_an_event_demands(slots: int, scope: str, need: int):
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(slots, scope=scope))
    assert f"budget of {slots} slots" in complaint(caught)
    assert f"at least {need} slots" in complaint(caught)
    with pytest.raises(UserError):
        Cache(GEOMETRY, slots, scope=scope)
    Replay(GEOMETRY, ReplaySettings(need, scope=scope)).add(EXPERTS)  # the number of the message is enough


@pytest.mark.parametrize("scope", ["global", "per-layer"])
def test_more_slots_than_experts(scope: str):
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(25, scope=scope))
    assert "25 slots" in complaint(caught)
    assert "24 experts" in complaint(caught)
    with pytest.raises(UserError):
        Cache(GEOMETRY, 25, scope=scope)
    Replay(GEOMETRY, ReplaySettings(24, scope=scope)).add(EXPERTS)


@pytest.mark.parametrize(
    "prefetch",
    ["", "top", "top0", "top06", "top-1", "Top6", "6", "top6@", "top6@0", "top6@-1", "top6@x", "top6@1@2", "top 6",
     "none6", "none@1", "top6\n", "\ntop6", "top\u0666", "top1.5", "p", "p>", "p>x", "p=0.5", "p>.", "top6p>0.5",
     "p>0.5,top6", "top6,", ",top6", "top6,top7", "p>.1,p>.2", "oracle@1", "oracle,p>.1", "moe_infinity,p>.1",
     "adaptive@2", "adaptive,top6", "adaptive,", "top6,p>0.5@"],
)  # fmt: skip
def test_unreadable_prefetch(prefetch: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch=prefetch, lookahead="token", lookaheads=("token",))
    assert repr(prefetch) in complaint(caught)
    assert "top6,p>0.1" in complaint(caught)  # examples of valid texts


@pytest.mark.parametrize("prefetch", ["p>1.01", "p>-0.1", "top6,p>7", "adaptive,p>2"])
def test_a_threshold_that_is_no_probability(prefetch: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch=prefetch, lookahead="token", lookaheads=("token",), device=ticking(1))
    assert repr(prefetch) in complaint(caught)
    assert "0 to 1" in complaint(caught)


def test_what_the_prefetcher_says():
    token = {"lookahead": "token", "lookaheads": ("token",)}
    found = {
        text: ReplaySettings(8, prefetch=text, device=ticking(1), **token).prefetch_settings(GEOMETRY)
        for text in ("top6", "top6@2", "p>0.5", "top6,p>.25@34", "adaptive", "adaptive,p>0", "moe_infinity", "oracle")
    }
    assert {text: (prefetch.max_experts, prefetch.distance) for text, prefetch in found.items()} == {
        "top6": (6, 1),
        "top6@2": (6, 2),
        "p>0.5": (8, 1),  # all of a layer
        "top6,p>.25@34": (6, 34),
        "adaptive": (4, 1),  # the best 2K of each layer
        "adaptive,p>0": (4, 1),
        "moe_infinity": (2, 1),  # K
        "oracle": (8, 1),
    }
    assert [prefetch.threshold for prefetch in found.values() if prefetch.threshold >= 0] == [0.5, 0.25, 0]


@pytest.mark.parametrize("prefetch", ["top6", "top6@2", "p>0.5", "adaptive", "moe_infinity"])
def test_prefetch_without_a_predictor(prefetch: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch=prefetch, device=ticking(1))
    assert repr(prefetch) in complaint(caught)
    assert "--predictor" in complaint(caught)


def test_what_needs_no_scores():
    ReplaySettings(8, prefetch="oracle")
    ReplaySettings(8, prefetch="top2", policy="moe_spac")  # has its own


def test_adaptive_without_a_device():
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch="adaptive", lookaheads=("token",))
    assert "--device" in complaint(caught)


@pytest.mark.parametrize("prefetch", ["adaptive", "moe_infinity"])
def test_what_asks_layers_ahead_and_knows_nothing_ahead(prefetch: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch=prefetch, lookaheads=(0,), device=ticking(1))
    assert "lookahead 0" in complaint(caught)


def test_moe_infinity_without_scores():
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, policy="moe_infinity")
    assert "--predictor" in complaint(caught)


@pytest.mark.parametrize(("lookahead", "distance"), [(0, -1), ("computed", 0), (1, 1), (2, 2)])
def test_a_distance_is_for_whole_token_scores(lookahead: int | str, distance: int):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch="top6@2", lookahead=lookahead, lookaheads=(lookahead,))
    assert "'top6@2'" in complaint(caught)
    assert f"lookahead {lookahead}" in complaint(caught)
    assert ReplaySettings(8, prefetch="top6", lookahead=lookahead, lookaheads=(lookahead,)).distance == distance


@pytest.mark.parametrize("lookaheads", [(1, "computed"), ("computed", 0), ("token", "computed"), ("next", 1), (2, 1)])
def test_lookaheads_have_an_order(lookaheads: tuple):
    ReplaySettings(8, lookaheads=(0, "computed", 1, 2, "token", "next"))
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, lookaheads=lookaheads)
    assert f"in the order 0, computed, 1, ..., token, next (got {lookaheads[0]}, {lookaheads[1]})" in complaint(caught)


@pytest.mark.parametrize("lookahead", [3, "token", None])
def test_a_lookahead_that_the_scores_do_not_have(lookahead):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch="top6", lookahead=lookahead, lookaheads=(1, 2))
    assert f"lookahead {lookahead}" in complaint(caught)
    assert "1, 2" in complaint(caught)


@pytest.mark.parametrize("lookahead", ["tokens", -1, "x"])
def test_no_lookahead(lookahead):
    with pytest.raises(UserError, match="lookahead"):
        ReplaySettings(8, prefetch="top6", lookahead=lookahead, lookaheads=(lookahead,))


def test_more_names_than_experts():
    token = {"lookahead": 1, "lookaheads": (1,)}
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8, prefetch="top9", **token))
    assert "'top9'" in complaint(caught)
    assert "8 experts" in complaint(caught)
    Replay(GEOMETRY, ReplaySettings(8, prefetch="top8", **token))


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("warmup_tokens", -1, "--warmup-tokens -1 "),
        ("prefill_chunk", -3, "--prefill-chunk -3 "),
        ("batch_size", 0, "--batch-size 0 "),
        ("window", 0, "--window 0 "),
    ],
)
def test_numbers_below_the_least(setting: str, value: int, says: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, **{setting: value})
    assert says in complaint(caught)


@pytest.mark.parametrize(
    ("quotas", "says"),
    [
        ((3, 3, 3), "9"),  # sum to 9, not 8
        ((4, 4), "2 numbers"),
        ((9, 2, 2), "9 slots"),  # of a layer with 8 experts
        ((1, 4, 3), "one event's demand of 2 experts"),
        ((-1, 5, 4), "one event's demand of 2 experts"),
    ],
)
def test_quotas_that_do_not_do(quotas: tuple[int, ...], says: str):
    slots = 13 if quotas[0] == 9 else 8
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(slots, scope="per-layer", quotas=quotas))
    assert says in complaint(caught)


def test_quotas_of_a_global_budget():
    with pytest.raises(UserError, match="--scope per-layer"):
        ReplaySettings(8, quotas=(3, 3, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"prefetch": "top1", "lookahead": 1, "lookaheads": (1,)},
        {"prefetch": "oracle"},
        {"device": ticking(1)},
        {"warm_start": True},
        {"prefill_chunk": 4},
        {"batch_size": 2},
        {"window": 2},
        {"policy": "belief"},
        {"policy": "moe_spac"},
        {"policy": "moe_infinity", "lookaheads": (1,)},
    ],
)
def test_what_does_not_go_access_by_access(change: dict):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, sequential=True, **change)
    assert "--sequential" in complaint(caught)


@pytest.mark.parametrize("settings", [ReplaySettings(8, policy="static"), ReplaySettings(8, warm_start=True)])
def test_what_needs_a_profile(settings: ReplaySettings):
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, settings)
    assert "--profile" in complaint(caught)
    Replay(GEOMETRY, settings, UsageProfile(np.full((3, 8), 0.25), default_hazard())).add(EXPERTS)


def test_a_profile_of_another_model():
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8), UsageProfile(np.full((3, 7), 0.25), default_hazard()))
    assert "(3, 7)" in complaint(caught)


ONE_AHEAD = ReplaySettings(8, prefetch="top1", lookahead=1, lookaheads=(1,))


def test_a_sequence_without_scores():
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ONE_AHEAD).add(EXPERTS)
    assert "scores" in complaint(caught)


def test_scores_of_other_lookaheads():
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ONE_AHEAD).add(EXPERTS, np.zeros((4, 2, 3, 8), np.float32))
    assert "1 lookaheads" in complaint(caught)


@pytest.mark.parametrize(
    "shape", [(4, 1, 3, 7), (3, 1, 3, 8), (5, 1, 3, 8), (4, 1, 8, 3), (4, 3, 8), (4, 8), (1, 4, 1, 3, 8)]
)
def test_scores_of_another_shape(shape: tuple[int, ...]):
    replay = Replay(GEOMETRY, ONE_AHEAD)
    with pytest.raises(UserError) as caught:
        replay.add(EXPERTS, np.zeros(shape, np.float32))
    assert str(shape) in complaint(caught)
    assert "(T, H, L, E)" in complaint(caught)
    assert not replay.counts().any()  # nothing of it was counted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_scores_that_are_no_probabilities(value: float):
    scores = np.full((4, 1, 3, 8), 0.5, np.float32)
    scores[3, 0, 2, 7] = value
    replay = Replay(GEOMETRY, ONE_AHEAD)
    with pytest.raises(UserError) as caught:
        replay.add(EXPERTS, scores)
    assert "0..1" in complaint(caught)
    assert not replay.counts().any()


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 2, 2), (4, 6), (4,)])
def test_experts_of_another_shape(shape: tuple[int, ...]):
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8)).add(np.zeros(shape, np.uint8))
    assert str(shape) in complaint(caught)


@pytest.mark.parametrize("expert", [-2, 8, 255])
def test_an_expert_that_the_model_does_not_have(expert: int):
    experts = EXPERTS.astype(np.int64)
    experts[2, 1, 0] = expert
    with pytest.raises(UserError, match=r"0\.\.7"):
        Replay(GEOMETRY, ReplaySettings(8)).add(experts)


@pytest.mark.parametrize("policy", ["belady", "belady_bypass"])
def test_belady_must_be_told_the_future(policy: str):
    with pytest.raises(ValueError, match="future"):
        Cache(GEOMETRY, 8, policy)
    with pytest.raises(ValueError, match="whole stream"):
        Replay(GEOMETRY, ReplaySettings(8, policy=policy, carry_over=True))


def test_a_replayed_sequence_leaves_memory_at_once():
    """Large sets stay in bounded memory only if no sequence waits for the collector of reference cycles."""
    sequence = ReplaySequence(GEOMETRY, EXPERTS)
    replay = Replay(GEOMETRY, ReplaySettings(8))
    gc.disable()
    try:
        replay.add_sequence(sequence)
        remaining = weakref.ref(sequence)
        del sequence
        assert remaining() is None
    finally:
        gc.enable()
