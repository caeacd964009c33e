"""What stands in a replay table."""

import pytest

from moe_beyond.errors import UserError
from moe_beyond.evaluation.strategies import strategies


def lines(*args, **options) -> list[tuple[int, str, str, object]]:
    return [(s.slots, s.policy, s.prefetch, s.lookahead) for s in strategies(*args, **options)]


def test_the_references_stand_beside_every_budget_once() -> None:
    assert lines([8, 16], policies=["lfu"]) == [
        (8, "lfu", "none", None),
        (8, "lru", "none", None),
        (8, "belady", "none", None),
        (16, "lfu", "none", None),
        (16, "lru", "none", None),
        (16, "belady", "none", None),
    ]
    assert lines([8, 8], policies=["belady", "lru", "lru"]) == [(8, "belady", "none", None), (8, "lru", "none", None)]


def test_prefetchers_are_replayed_at_every_lookahead() -> None:
    found = lines([8], policies=["lru"], prefetches=["none", "top2"], lookaheads=[1, 2], predictor="p")
    assert found == [
        (8, "lru", "none", None),
        (8, "lru", "top2", 1),
        (8, "lru", "top2", 2),
        (8, "belady", "none", None),
    ]


def test_a_line_without_prefetch_names_no_predictor() -> None:
    found = strategies([8], policies=["lru"], prefetches=["top2"], lookaheads=["token"], predictor="p")
    assert [(s.prefetch, s.predictor) for s in found] == [("top2", "p"), ("none", None), ("none", None)]


def test_prefetching_needs_scores() -> None:
    with pytest.raises(UserError, match="needs scores"):
        strategies([8], policies=["lru"], prefetches=["top2"])
