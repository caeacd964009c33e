"""Intervals over sequences: by hand, against plain Python, and paired."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, there, tiny_traces
from _helpers.scoring import foresight, seer

from moe_beyond.errors import UserError
from moe_beyond.evaluation.bootstrap import RecallSums, recall_intervals, resampled, result_intervals
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.strategies import grid, strategy, with_baselines
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.simulator.sums import SequenceSums
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

COMMON = ReplaySettings(32, warmup_tokens=3)
SLOW = load_device("rtx3060,link_gb_per_s=0.003,memory_gb_per_s=0.02")
SOURCE = seer("seer", (1, 2))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    return tiny_traces(tmp_path_factory.mktemp("bootstrap") / "traces", sequences=16)


def test_draws_of_two_rows_by_hand() -> None:
    """Two sequences: a quarter of the draws has one of them twice, half has both."""
    drawn = resampled(np.array([[1.0, 10.0], [3.0, 10.0]]), 4000)
    sums, times = np.unique(drawn[:, 0], return_counts=True)
    assert sums.tolist() == [2, 4, 6]
    np.testing.assert_allclose(times / 4000, [0.25, 0.5, 0.25], atol=0.03)
    assert set(drawn[:, 1]) == {20}
    np.testing.assert_array_equal(drawn, resampled(np.array([[1.0, 10.0], [3.0, 10.0]]), 4000))  # seeded


def test_recall_by_hand() -> None:
    # Two layers. Sequence a finds 1 of 2 and 4 of 4, b 3 of 6 and 0 of 2. Drawn twice, a has (1/2 + 1) / 2 = 0.75 and b
    # (1/2 + 0) / 2 = 0.25: the ends, since each is a quarter of the draws.
    found, named = [np.array([[1.0, 4.0]]), np.array([[3.0, 0.0]])], [np.array([[2.0, 4.0]]), np.array([[6.0, 2.0]])]
    assert recall_intervals(RecallSums(["b", "a"], found, named), 1000) == [[0.25, 0.75]]


def test_differences_are_paired(traces: TraceSet) -> None:
    """The draws are the same for all: of a strategy and LRU itself the difference is nothing in each of them."""
    lru = strategy(COMMON, 8, "lru")
    same, plain = evaluate(traces, [replace(lru, name="the same"), lru], bootstrap_draws=300).results
    assert same.intervals["hit_rate"] == plain.intervals["hit_rate"]
    assert same.intervals["hit_rate"][0] < same.hit_rate < same.intervals["hit_rate"][1]
    assert same.intervals["minus_lru"] == {"hit_rate": [0, 0], "bytes_ratio": [0, 0]}
    assert "minus_lru" not in plain.intervals


def test_the_order_in_which_sequences_came_changes_nothing(traces: TraceSet) -> None:
    backwards = seer("seer", (1, 2), backwards=True)
    asked = [strategy(COMMON, 8, "lru", "top2", SOURCE), strategy(COMMON, 8, "lru")]
    one, other = (
        evaluate(traces, asked, sources=[source], measure=source, bootstrap_draws=200) for source in (SOURCE, backwards)
    )
    assert one.to_json() == other.to_json()


def test_against_plain_python(traces: TraceSet) -> None:
    """Every sequence separately, drawn by another generator: the ends agree as far as chance allows."""
    draws = 3000
    common = replace(COMMON, device=SLOW)
    asked = with_baselines(grid(common, [8], ["lru"], ["top2"], SOURCE, [1]), common, TINY)
    found = evaluate(traces, asked, sources=[SOURCE], measure=SOURCE, bootstrap_draws=draws)
    kept = [trace for trace in traces.traces() if len(trace) > 3]
    assert 2 < len(kept) < len(list(traces.traces()))
    alone = {}
    for settings in asked[:2]:
        alone[settings.strategy] = []
        for trace in kept:
            replaying = Replay(TINY, settings)
            scores = foresight(trace, 2, 8)
            replaying.add(trace.experts, scores if settings.lookaheads else None, trace.decode_start)
            alone[settings.strategy].append(replaying.result())
    rng = random.Random(7)
    figures = {name: [] for name in ("hits", "bytes", "speed", "minus", "recall")}
    everyone = [recalled(trace) for trace in traces.traces()]
    for _ in range(draws):
        picked = rng.choices(range(len(kept)), k=len(kept))
        ours, lru = ([alone[name][i] for i in picked] for name in ("lru + top2", "lru"))
        hits = sum(r.hits for r in ours) / sum(r.accesses for r in ours)
        figures["hits"].append(hits)
        figures["minus"].append(hits - sum(r.hits for r in lru) / sum(r.accesses for r in lru))
        moved = sum(r.demand_transfers + r.prefetch_transfers for r in ours)
        figures["bytes"].append(moved / sum(r.accesses for r in ours))
        figures["speed"].append(sum(r.tokens for r in ours) / sum(r.tokens / r.tokens_per_second for r in ours))
        again = rng.choices(everyone, k=len(everyone))
        by_layer = [sum(one[n][0] for one in again) / sum(one[n][1] for one in again) for n in range(4)]
        figures["recall"].append(sum(by_layer) / 4)
    result = found.results[0]
    said = {
        "hits": result.intervals["hit_rate"],
        "bytes": result.intervals["bytes_ratio"],
        "speed": result.intervals["tokens_per_second"],
        "minus": result.intervals["minus_lru"]["hit_rate"],
        "recall": found.metrics[0].intervals["recall_at_k"],
    }
    for name, values in figures.items():
        ends = np.quantile(values, [0.025, 0.975])
        assert said[name] == pytest.approx(ends, abs=0.1 * (ends[1] - ends[0])), name


def recalled(trace: Trace) -> list[tuple[int, int]]:
    """The chosen experts among the two best of `foresight`'s first slice, and all chosen ones."""
    scores, sums = foresight(trace, 2, 8), []
    for layer in range(4):
        best = [sorted(range(8), key=lambda e, row=row: (-row[e], e))[:2] for row in scores[:, 0, layer].tolist()]
        chosen = [set(there(row).tolist()) for row in trace.experts[:, layer]]
        found = sum(len(c & {*b}) for c, b in zip(chosen, best, strict=True))
        sums.append((found, sum(map(len, chosen))))
    return sums


def test_a_fixed_choice_is_moved_in_once_in_every_draw(traces: TraceSet) -> None:
    # Two sequences of equal demand: bytes are (once + misses) / demand of each draw.
    counts = np.zeros((1, 8), np.int64)
    sums = SequenceSums(once=5)
    for name, misses in (("a", 1), ("b", 3)):
        row = counts.copy()
        row[0, [0, 4]] = 10, misses
        sums.add([name], row, demanded=10, tokens=0, seconds=0.0)
    [result] = evaluate(traces, [strategy(COMMON, 8, "static_hindsight")]).results
    [found] = result_intervals([result], [sums], 1000)
    assert found.intervals["bytes_ratio"] == [(5 + 2) / 20, (5 + 6) / 20]


def test_batches_are_drawn_whole(traces: TraceSet) -> None:
    batched = replace(strategy(COMMON, 20, "lru"), batch_size=4)
    [result] = evaluate(traces, [batched], bootstrap_draws=200).results
    assert result.intervals["hit_rate"][0] <= result.hit_rate <= result.intervals["hit_rate"][1]


@pytest.mark.parametrize("bootstrap_draws", [1, 99, -1])
def test_too_few_draws(traces: TraceSet, bootstrap_draws: int) -> None:
    with pytest.raises(UserError, match=rf"--bootstrap: too few draws .*got {bootstrap_draws}\)"):
        evaluate(traces, [strategy(COMMON, 8, "lru")], bootstrap_draws=bootstrap_draws)


def test_one_sequence_has_no_interval(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--bootstrap: draws need at least two sequences"):
        evaluate(
            tiny_traces(tmp_path / "one", sequences=1), [strategy(ReplaySettings(32), 8, "lru")], bootstrap_draws=100
        )


def test_without_draws_nothing_is_written(traces: TraceSet) -> None:
    said = evaluate(traces, [strategy(COMMON, 8, "lru")], sources=[SOURCE], measure=SOURCE).to_json()
    assert "intervals" not in said["results"][0]
    assert "intervals" not in said["metrics"][0]
    assert "bootstrap_draws" not in said
