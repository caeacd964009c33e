"""Rows of a replay table: strategies and their baselines."""

from dataclasses import replace

import pytest
from _helpers.common import TINY
from _helpers.scoring import seer

from moe_beyond.errors import UserError
from moe_beyond.evaluation.strategies import CLAIRVOYANT, grid, named_strategies, with_baselines
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import DEVICES

COMMON = ReplaySettings(TINY.total_experts)
TIMED = replace(COMMON, device=DEVICES["rtx3060"])


def words(found: list[ReplaySettings]) -> list[tuple[int, str, object]]:
    return [(s.slots, s.strategy, s.lookahead) for s in found]


def test_every_combination_once_in_the_order_asked_for() -> None:
    found = grid(COMMON, [16, 8, 16], ["lru", "belady", "lru"], ["none", "top2"], seer("p", (1, 2)), [2, 1])
    lines = [("lru", None), ("lru + top2", 2), ("lru + top2", 1)]
    lines += [("belady", None), ("belady + top2", 2), ("belady + top2", 1)]
    assert words(found) == [(slots, *line) for slots in (16, 8) for line in lines]
    assert {s.predictor for s in found if s.lookahead} == {"p"}
    assert {(s.predictor, s.lookaheads) for s in found if not s.lookahead} == {(None, ())}


def test_what_reads_scores_names_the_predictor_whatever_is_prefetched() -> None:
    source = seer("p", ("token",))
    belief, adaptive, oracle = grid(TIMED, [8], ["belief"], ["none", "adaptive", "oracle"], source, ["token"])
    assert {(s.predictor, s.lookaheads, s.lookahead) for s in (belief, adaptive, oracle)} == {("p", ("token",), None)}
    lru, adaptive, oracle = grid(TIMED, [8], ["lru"], ["none", "adaptive", "oracle"], source, ["token"])
    assert (lru.predictor, adaptive.predictor, oracle.predictor) == (None, "p", None)


def test_prefetching_needs_scores() -> None:
    with pytest.raises(UserError, match="needs scores"):
        grid(COMMON, [8], ["lru"], ["top2"])


def test_the_references_stand_beside_every_budget_once() -> None:
    asked = grid(COMMON, [8, 16], ["lfu", "lru"])
    assert words(with_baselines(asked, COMMON, TINY)) == [
        (slots, name, None) for slots in (8, 16) for name in ("lfu", "lru", "belady", "static_hindsight")
    ]


def test_on_a_device_there_is_what_the_link_allows_and_all_resident_once() -> None:
    asked = grid(TIMED, [8, 16], ["lru"])
    found = with_baselines(asked, TIMED, TINY)
    names = ("lru", "belady", "static_hindsight", CLAIRVOYANT)
    assert words(found) == [(s, name, None) for s in (8, 16) for name in names] + [(32, "all_resident", None)]
    assert {s.device for s in found} == {TIMED.device}
    assert (found[3].policy, found[3].prefetch) == ("belady", "oracle")


def test_lru_stands_next_to_a_window_in_the_same_windows() -> None:
    [spac], _, _ = named_strategies(["moe-spac"], COMMON, [8], 2, None, lambda architecture: None)
    plain = grid(COMMON, [8, 16], ["lfu"])
    found = with_baselines([spac, *plain], COMMON, TINY)
    windowed = [s for s in found if s.window > 1]
    assert [(s.slots, s.strategy, s.policy, s.prefetch, s.window) for s in windowed] == [
        (8, "moe-spac", "moe_spac", "p>0", 8),
        (8, "lru, window 8", "lru", "none", 8),
    ]
    assert not any(s.window > 1 for s in with_baselines(plain, COMMON, TINY))
    wide = replace(COMMON, window=8)  # all have it: LRU does, too
    assert [s.strategy for s in with_baselines(grid(wide, [8], ["lfu"]), wide, TINY)][:2] == ["lfu", "lru"]


def test_references_share_the_conditions_but_start_cold() -> None:
    common = replace(TIMED, warm_start=True, scope="per-layer", warmup_tokens=3, carry_over=True, bits=4.0)
    asked = grid(common, [9], ["lru"], quotas=lambda slots: (3, 2, 2, slots - 7))
    ours, *references = with_baselines(asked, common, TINY, lambda slots: (3, 2, 2, slots - 7))
    assert ours.warm_start
    assert not any(s.warm_start for s in references)
    assert {(s.warmup_tokens, s.carry_over, s.bits) for s in references} == {(3, True, 4.0)}
    assert {(s.scope, s.quotas) for s in references[:-1]} == {("per-layer", (3, 2, 2, 2))}
    assert (references[-1].policy, references[-1].scope, references[-1].quotas) == ("all_resident", "global", None)
