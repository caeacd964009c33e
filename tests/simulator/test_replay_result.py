"""The record of a replay."""

import json
from dataclasses import replace

import numpy as np
import pytest
from _helpers.cache_cases import TICK, replay, scored, small_geometry, ticking
from _helpers.reference_cache import COUNTERS

from moe_beyond.simulator import Replay, ReplaySettings, Result

KEYS = (
    "strategy, policy, prefetch, predictor, lookahead, scope, budget_slots, budget_share, demand_ratio, accesses, "
    "hits, late_hits, misses, hit_rate, bytes_ratio, demand_transfers, prefetch_transfers, useful_prefetches, "
    "wasted_prefetches, per_layer"
).split(", ")

# Two layers a and b, K=1, three slots. Demanded: a0 b1 | a0 b2. Predicted: a0 b0 | a1 b2.
# ask a0: comes. a0H. Ask b0: comes. b1M: a0 b0 b1. | ask a1: comes, drops a0 (oldest). a0M drops b0, wasted.
# Ask b2: comes, drops b1 (a0 computes). b2H. a1 stays, wasted.
GEOMETRY = small_geometry(2, 4, 1)
SETTINGS = ReplaySettings(3, prefetch="top1", lookahead=1, lookaheads=(1,), predictor="guess")
EXPERTS = [[[0], [1]], [[0], [2]]]
SCORES = scored(GEOMETRY, [[[0], [0]], [[1], [2]]])


@pytest.fixture
def result() -> Result:
    return replay(GEOMETRY, SETTINGS, EXPERTS, SCORES)


def test_keys_and_values(result: Result):
    written = result.to_json()
    assert set(KEYS) <= set(written)
    a = {"accesses": 2, "hits": 1, "misses": 1, "demand_transfers": 1, "prefetch_transfers": 2, "useful_prefetches": 1}
    both = {"layer": 0, **a, "late_hits": 0, "wasted_prefetches": 1, "on_host": 0, "hit_rate": 0.5}
    assert written["per_layer"] == [both, {**both, "layer": 1}]
    del written["per_layer"]
    assert written == {
        "strategy": "lru + top1",
        "policy": "lru",
        "prefetch": "top1",
        "predictor": "guess",
        "lookahead": 1,
        "leaks": False,
        "causal": True,
        "scope": "global",
        "budget_slots": 3,
        "budget_share": 3 / 8,
        "demand_ratio": 3 / 2,  # a token needs L*K = 2
        "accesses": 4,
        "hits": 2,
        "late_hits": 0,
        "misses": 2,
        "miss_handling": "move",
        "on_host": 0,
        "hit_rate": 2 / 4,
        "bytes_ratio": 6 / 4,  # 2 on demand, 4 prefetched
        "demand_transfers": 2,
        "prefetch_transfers": 4,
        "useful_prefetches": 2,
        "wasted_prefetches": 2,
        "demanded": 4,
        "sequences": 1,
        "too_short": 0,
        "tokens": 2,
        "warmup_tokens": 0,
        "window": 1,
        "batch_size": 1,
        "prefill_chunk": 0,
        "warm_start": False,
        "carry_over": False,
    }


def test_json_keeps_everything(result: Result):
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == result.to_json()


def test_two_runs_write_the_same_bytes(result: Result):
    again = replay(GEOMETRY, SETTINGS, EXPERTS, SCORES)
    assert json.dumps(again.to_json()).encode() == json.dumps(result.to_json()).encode()


def test_layers_add_up(result: Result):
    written = result.to_json()
    for name in COUNTERS:
        assert sum(row[name] for row in written["per_layer"]) == written[name]


@pytest.mark.parametrize(
    ("settings", "strategy", "lookahead"),
    [
        (ReplaySettings(4, policy="belady"), "belady", None),
        (
            ReplaySettings(4, policy="lfu", prefetch="top2@3", lookahead="token", lookaheads=("token",)),
            "lfu + top2@3",
            "token",
        ),
        (ReplaySettings(4, prefetch="top2", lookahead=0, lookaheads=(0,)), "lru + top2", 0),
        (ReplaySettings(4, policy="belief", lookaheads=(1,), name="belief-cross-layer"), "belief-cross-layer", None),
    ],
)
def test_what_was_asked_for_is_on_record(settings: ReplaySettings, strategy: str, lookahead):
    written = replay(GEOMETRY, settings, EXPERTS, SCORES).to_json()
    assert written["strategy"] == strategy
    assert written["lookahead"] == lookahead
    assert written["predictor"] is None


def test_rates_are_zero_where_nothing_was_counted():
    replaying = Replay(GEOMETRY, ReplaySettings(3, warmup_tokens=2))
    replaying.add(np.array(EXPERTS))
    written = replaying.result().to_json()
    assert (written["sequences"], written["too_short"], written["tokens"], written["demanded"]) == (0, 1, 0, 0)
    assert written["accesses"] == written["hit_rate"] == written["bytes_ratio"] == 0
    assert [row["hit_rate"] for row in written["per_layer"]] == [0, 0]


def test_a_result_is_of_what_was_added_so_far(result: Result):
    replaying = Replay(GEOMETRY, SETTINGS)
    replaying.add(np.array(EXPERTS), SCORES)
    first = replaying.result()
    replaying.add(np.array(EXPERTS), SCORES)
    assert first == result
    assert replaying.result().accesses == 2 * first.accesses
    assert replaying.result().hit_rate == first.hit_rate


TIMES = (
    "device, bytes_per_token, stall_ms_per_token, compute_ms_per_token, tokens_per_second, token_ms_p50, token_ms_p95, "
    "token_ms_p99, prefill_ms, link_ms_per_token"
).split(", ")


def test_without_a_device_there_are_no_times(result: Result):
    assert not set(TIMES) & set(result.to_json())
    assert result.device is None
    assert result.tokens_per_second is None
    assert "note" not in result.to_json()


def test_times(result: Result):
    # Ticks: a transfer 2, else 1 each. Slots 3. Token 1: ask a0 at 0: crosses from 0 to 2. a0 is late at 1, there at 2,
    # through at 3. b0, prefetched at 1, crosses from 2 to 4. b is routed at 4: b1 is missing, there at 6, through at 7.
    # Token 2: at 7 ask a1: it drops a0 (oldest), crosses from 7 to 9. a0 is missing at 8: there at 11 and drops b0,
    # through at 12. b2, prefetched at 8, crosses from 11 to 13, drops b1. b is routed at 13: a hit. Through at 14.
    # Token 1 takes 7, of those 3 stall (1 and 2); token 2 takes 7, of those 3 stall. Six transfers.
    settings = replace(SETTINGS, device=ticking(2), bits=8.0, note="by hand")
    written = replay(GEOMETRY, settings, EXPERTS, SCORES).to_json()
    assert list(written)[: len(KEYS)] == list(result.to_json())[: len(KEYS)]
    assert {name: written[name] for name in (*TIMES, "note")} == {
        "device": "ticking",
        "bytes_per_token": 6e9 / 2,
        "stall_ms_per_token": 3 * TICK * 1e3,
        "compute_ms_per_token": 4 * TICK * 1e3,
        "tokens_per_second": 2 / (14 * TICK),
        "token_ms_p50": 7 * TICK * 1e3,
        "token_ms_p95": 7 * TICK * 1e3,
        "token_ms_p99": 7 * TICK * 1e3,
        "prefill_ms": None,
        "link_ms_per_token": 6 * TICK * 1e3,
        "note": "by hand",
    }
    counted = ("hits", "late_hits", "misses", "demand_transfers", "prefetch_transfers", "useful_prefetches")
    assert [written[name] for name in counted] == [1, 1, 2, 2, 4, 1]
    assert json.loads(json.dumps(written, allow_nan=False)) == written


# One layer, K = 1, four slots, a transfer of 3 ticks and 1 for everything else. Windows of three.
WINDOWED = ReplaySettings(4, window=3, device=ticking(3), bits=8.0)
ONE_LAYER = small_geometry(1, 4, 1)


def test_a_window_reports_by_token():
    # {0 0 1}: 1 + 6 + 1 ticks, as 0 computes while 1 arrives; {2}: 1 + 3 + 1. Two accesses and one, but four experts
    # demanded token by token.
    written = replay(ONE_LAYER, WINDOWED, [[[e]] for e in (0, 0, 1, 2)]).to_json()
    assert (written["accesses"], written["misses"], written["demanded"], written["tokens"]) == (3, 3, 4, 4)
    assert written["bytes_ratio"] == 3 / 4
    assert written["tokens_per_second"] == pytest.approx(4 / (13 * TICK))
    # 8 / 3 ticks each for three tokens, 5 for one.
    assert written["token_ms_p50"] == pytest.approx(8 / 3 * TICK * 1e3)
    assert written["token_ms_p99"] == pytest.approx((8 / 3 + 0.97 * (5 - 8 / 3)) * TICK * 1e3)
    assert written["window"] == 3


def test_a_window_ends_where_the_warm_up_does():
    # Warm-up of two: {0 0} | {1 0 2} {3}. The same four tokens count as without windows.
    written = replay(ONE_LAYER, replace(WINDOWED, warmup_tokens=2), [[[e]] for e in (0, 0, 1, 0, 2, 3)]).to_json()
    assert (written["tokens"], written["demanded"], written["accesses"], written["hits"]) == (4, 4, 4, 1)
    alone = replay(ONE_LAYER, replace(WINDOWED, window=1, warmup_tokens=2), [[[e]] for e in (0, 0, 1, 0, 2, 3)])
    assert (alone.tokens, alone.demanded, alone.accesses) == (4, 4, 4)
    # Prefill chunks end there too: {0 0} | {1 0} {2 3}.
    chunked = replace(WINDOWED, window=1, prefill_chunk=4, warmup_tokens=2)
    read = replay(ONE_LAYER, chunked, [[[e]] for e in (0, 0, 1, 0, 2, 3)], decode_start=5)
    assert (read.tokens, read.demanded, read.accesses) == (4, 4, 4)


def test_a_batchs_tokens_each_take_its_whole_step():
    # Two sequences, step by step: {0 1}: 1 + 6 + 1 ticks, {0}: 1 + 0 + 1, of only the longer one.
    replaying = Replay(ONE_LAYER, replace(WINDOWED, window=1, batch_size=2))
    replaying.add(np.array([[[0]], [[0]]]))
    replaying.add(np.array([[[1]]]))
    result = replaying.result()
    assert (result.sequences, result.tokens, result.demanded, result.accesses) == (2, 3, 3, 3)
    assert result.token_ms_p50 == pytest.approx((8 + 2) / 2 * TICK * 1e3)
    assert result.tokens_per_second == pytest.approx(3 / (10 * TICK))
