"""What a user may get wrong, and the one line that says so."""

import numpy as np
import pytest
from cache_cases import small_geometry

from moe_beyond.cache.cache import Cache
from moe_beyond.cache.policies import POLICIES
from moe_beyond.errors import UserError
from moe_beyond.replay import Replay, ReplaySettings

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
    Replay(GEOMETRY, ReplaySettings(need, scope=scope)).add(EXPERTS)  # what the message says is enough


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
     "none6", "none@1", "top6\n", "\ntop6", "top\u0666", "top1.5"],
)  # fmt: skip
def test_unreadable_prefetch(prefetch: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch=prefetch, lookahead="token")
    assert repr(prefetch) in complaint(caught)
    assert "top6@2" in complaint(caught)  # says what can be written


@pytest.mark.parametrize("prefetch", ["top6", "top6@2"])
def test_prefetch_without_a_predictor(prefetch: str):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch=prefetch)
    assert repr(prefetch) in complaint(caught)
    assert "--predictor" in complaint(caught)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_distance_is_for_whole_token_scores(lookahead: int):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, prefetch="top6@2", lookahead=lookahead)
    assert "'top6@2'" in complaint(caught)
    assert f"{lookahead} layers ahead" in complaint(caught)
    assert ReplaySettings(8, prefetch="top6", lookahead=lookahead).distance == lookahead


def test_what_the_prefetcher_says_of_whole_token_scores():
    settings = [ReplaySettings(8, prefetch=prefetch, lookahead="token") for prefetch in ("top6", "top6@2", "top12@34")]
    assert [(one.names, one.distance) for one in settings] == [(6, 1), (6, 2), (12, 34)]


def test_more_names_than_experts():
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8, prefetch="top9", lookahead=1))
    assert "'top9'" in complaint(caught)
    assert "8 experts" in complaint(caught)
    Replay(GEOMETRY, ReplaySettings(8, prefetch="top8", lookahead=1))


@pytest.mark.parametrize("warmup", [-1, -100])
def test_negative_warmup(warmup: int):
    with pytest.raises(UserError) as caught:
        ReplaySettings(8, warmup_tokens=warmup)
    assert f"--warmup-tokens {warmup} " in complaint(caught)


def test_a_sequence_without_scores():
    with pytest.raises(UserError) as caught:
        Replay(GEOMETRY, ReplaySettings(8, prefetch="top1", lookahead=1)).add(EXPERTS)
    assert "needs scores" in complaint(caught)


@pytest.mark.parametrize("shape", [(4, 3, 7), (3, 3, 8), (5, 3, 8), (4, 8, 3), (4, 8), (1, 4, 3, 8)])
def test_scores_of_another_shape(shape: tuple[int, ...]):
    replay = Replay(GEOMETRY, ReplaySettings(8, prefetch="top1", lookahead=1))
    with pytest.raises(UserError) as caught:
        replay.add(EXPERTS, np.zeros(shape, np.float32))
    assert str(shape) in complaint(caught)
    assert "(4, 3, 8)" in complaint(caught)
    assert not replay.counts.any()  # nothing of it was counted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_scores_that_are_no_probabilities(value: float):
    scores = np.full((4, 3, 8), 0.5, np.float32)
    scores[3, 2, 7] = value
    replay = Replay(GEOMETRY, ReplaySettings(8, prefetch="top1", lookahead=1))
    with pytest.raises(UserError) as caught:
        replay.add(EXPERTS, scores)
    assert "0..1" in complaint(caught)
    assert not replay.counts.any()


def test_belady_must_be_told_the_future():
    with pytest.raises(ValueError, match="future"):
        Cache(GEOMETRY, 8, "belady")
