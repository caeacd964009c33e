"""The line with the conditions of replays."""

from dataclasses import replace

import pytest
from _helpers.common import TINY

from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.report.html.sections.replay import format_speed
from moe_beyond.report.html.sections.timing import verdicts
from moe_beyond.report.tables.conditions import format_conditions, format_left_out
from moe_beyond.report.tables.results import results_table
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet

COMMON = ReplaySettings(32)
DEVICE = load_device("rtx3060,link_gb_per_s=0.003,memory_gb_per_s=0.02")


def replayed(traces: TraceSet, **changes: object) -> list[Result]:
    common = replace(COMMON, **changes)
    return evaluate(traces, with_baselines(grid(common, [8], ["lru"]), common, TINY)).results


def test_by_default(trace_set: TraceSet) -> None:
    tokens = sum(map(len, trace_set.traces()))
    assert format_conditions(replayed(trace_set)) == (
        "each sequence starts with an empty cache; one token per step, prompts included; "
        f"12 sequences, {tokens} tokens counted"
    )


def test_a_warm_up_says_what_it_leaves_out(trace_set: TraceSet) -> None:
    lengths = [len(trace) for trace in trace_set.traces()]
    short = sum(length <= 10 for length in lengths)
    assert 0 < short < 12
    results = replayed(trace_set, warmup_tokens=10)
    assert (results[0].sequences, results[0].too_short) == (12 - short, short)
    assert results[0].tokens == sum(max(length - 10, 0) for length in lengths)
    assert {(r.sequences, r.too_short, r.tokens, r.demanded) for r in results} == {
        (12 - short, short, results[0].tokens, results[0].tokens * 8)
    }
    assert f"{short} of 12 sequences are too short to count" in format_conditions(results)
    assert results[0].to_json()["too_short"] == short


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"carry_over": True}, "each sequence starts with the cache of the previous one"),
        ({"prefill_chunk": 4}, "prompts in steps of 4 tokens; hit rate over the distinct experts of a step"),
        ({"batch_size": 2}, "prompts included, batches of 2 sequences; hit rate over"),
        ({"device": DEVICE}, "tok/s is a forecast without dense layers and head and the KV cache"),
    ],
)
def test_they_follow_the_options(trace_set: TraceSet, changes: dict[str, object], words: str) -> None:
    said = format_conditions(replayed(trace_set, **changes))
    assert words in said
    assert ("empty cache" in said) == ("carry_over" not in changes)
    assert ("forecast" in said) == ("device" in changes)


def test_parts_without_a_time_are_named() -> None:
    assert format_left_out([]) == ""
    assert format_left_out(["kv_values_per_token"]) == " without the KV cache: the geometry has no kv_values_per_token"


def test_a_warm_start_is_of_those_that_have_one(trace_set: TraceSet) -> None:
    cold = replayed(trace_set)
    warm = replace(cold[0], warm_start=True)
    assert format_conditions([warm, *cold]).startswith(
        "each sequence starts with the most popular experts (baselines: with an empty cache); "
    )
    assert format_conditions([warm]).startswith("each sequence starts with the most popular experts; ")


def test_budgets_that_the_device_cannot_hold_are_named(trace_set: TraceSet) -> None:
    # Experts of 2,000 bytes, 4 layers of 10,000 bytes more; of 60 kB an eighth is kept: (52,500 - 40,000) / 2,000.
    device = replace(DEVICE, name="small", memory_gb=60e-6)
    results = replayed(trace_set, device=device)
    assert {result.device_slots for result in results} == {6}
    assert not any(result.fits_device for result in results)
    assert "small has room for 6 experts" in format_conditions(results)
    assert "8, 32 slots do not fit" in format_conditions(results)
    caption = " ".join(str(results_table(results, TINY).caption).split())
    assert "8, 32 slots do not fit" in caption
    assert "do not fit" not in format_conditions(replayed(trace_set, device=DEVICE))
    assert results[0].to_json()["device_slots"] == 6
    assert "device_slots" not in replayed(trace_set)[0].to_json()


@pytest.fixture
def timed(trace_set: TraceSet) -> list[Result]:
    """LRU, and a stand-in for it with a predictor's prefetch."""
    results = [r for r in replayed(trace_set, device=DEVICE) if r.policy != "all_resident"]
    ours = replace(results[0], strategy="lru + top2", prefetch="top2", predictor="p", lookahead=1)
    return [ours, *results]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.2, "is faster: lru + top2 reaches 120.0 tokens/s, LRU without prefetching 100.0 (+20%)."),
        (0.9, "is slower: lru + top2 reaches 90.0 tokens/s, LRU without prefetching 100.0 (-10%)."),
        (
            0.999,
            "makes no difference: lru + top2 reaches 99.9 tokens/s, LRU without prefetching 100.0 (within 1%).",
        ),
    ],
)
def test_whether_prefetching_pays(timed: list[Result], ratio: float, words: str) -> None:
    speeds = {"lru": 100.0, "lru + top2": 100 * ratio}
    results = [replace(r, tokens_per_second=speeds.get(r.strategy, 150.0)) for r in timed]
    assert verdicts(results) == [f"On {DEVICE.name} with 8 slots, prefetching {words}"]


def test_prefetching_is_compared_with_the_best_policy_that_does_not_prefetch(timed: list[Result]) -> None:
    lru = next(result for result in timed if result.strategy == "lru")
    scored = next(result for result in timed if result.predictor is not None)
    belief = replace(scored, strategy="belief", policy="belief", prefetch="none", tokens_per_second=119.0)
    results = [replace(lru, tokens_per_second=100.0), replace(scored, tokens_per_second=128.0), belief]
    assert verdicts(results) == [
        f"On {DEVICE.name} with 8 slots, prefetching is faster: {scored.strategy} reaches 128.0 "
        "tokens/s, belief without prefetching 119.0 (+8%)."
    ]


def test_nothing_is_said_without_a_device_or_a_prefetch(trace_set: TraceSet, timed: list[Result]) -> None:
    assert verdicts(replayed(trace_set)) == []
    assert verdicts(timed[1:]) == []


@pytest.mark.parametrize(("value", "words"), [(47259.04, "47,259"), (999.94, "999.9"), (1000.0, "1,000"), (None, "-")])
def test_speeds_have_no_more_digits_than_they_need(timed: list[Result], value: float | None, words: str) -> None:
    assert format_speed(replace(timed[0], tokens_per_second=value)) == words
