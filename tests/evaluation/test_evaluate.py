"""Evaluations: the same figures for any number of threads and any size of blocks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import tiny_traces
from _helpers.scoring import foresight, history_folder, seer

from moe_beyond.errors import UserError
from moe_beyond.evaluation import parts as module
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import ScoreSource, from_predictor_folder
from moe_beyond.evaluation.strategies import grid, strategy, with_baselines
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet

COMMON = ReplaySettings(32)
SLOW = load_device("rtx3060,link_gb_per_s=0.003,memory_gb_per_s=0.02")  # computing and moving take alike


def counted(result: Result) -> tuple[int, ...]:
    return result.accesses, result.hits, result.late_hits, result.demand_transfers, result.prefetch_transfers


def by_hand(traces: TraceSet, settings: ReplaySettings, backwards: bool = False) -> Result:
    replaying = Replay(traces.geometry, settings)
    found = list(traces.traces())
    for trace in found[::-1] if backwards else found:
        scores = foresight(trace, len(settings.lookaheads), 8) if settings.lookaheads else None
        replaying.add(trace.experts, scores, trace.decode_start)
    return replaying.result()


@pytest.mark.parametrize("device", [None, SLOW])
def test_threads_and_portions_change_nothing(
    trace_set: TraceSet, device: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = replace(COMMON, device=device)
    source = seer("seer", (1, 2))
    asked = with_baselines(
        grid(common, [8, 16], ["belief", "lru"], ["p>0.5"], source, [1, 2]), common, trace_set.geometry
    )
    whole = evaluate(trace_set, asked, sources=[source], measure=source)
    assert [(r.strategy, r.budget_slots, r.lookahead) for r in whole.results] == [
        (s.strategy, s.slots, s.lookahead) for s in asked
    ]
    for cores, tokens in ((1, 1), (5, 30), (64, 10**9)):
        monkeypatch.setattr(module.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(module, "BLOCK_TOKENS", tokens)
        assert evaluate(trace_set, asked, sources=[source], measure=source).to_json() == whole.to_json()
    # A strategy has the same result separately as with the others.
    for settings, result in zip(asked, whole.results, strict=True):
        assert evaluate(trace_set, [settings], sources=[source]).results == [result]


def test_several_sources_each_serve_their_own(trace_set: TraceSet) -> None:
    passes = []

    def watched(source: ScoreSource) -> ScoreSource:
        def sequences(*args: object):
            passes.append(source.name)
            return source.sequences(*args)

        return replace(source, sequences=sequences)

    one, two, idle = watched(seer("one")), watched(seer("two", (2, 3))), watched(seer("idle"))
    plain = strategy(COMMON, 8, "lru")
    first, second = strategy(COMMON, 8, "lru", "top2", one), strategy(COMMON, 8, "lru", "top2", two)
    done = []
    found = evaluate(trace_set, [second, plain, first], sources=[one, idle, two], measure=two, progress=done.append)
    assert [r.predictor for r in found.results] == ["two", None, "one"]
    assert passes == ["one", "two"]
    assert sum(done) == 3 * trace_set.manifest.tokens
    alone = [evaluate(trace_set, [s], sources=[one, two]).results[0] for s in (second, plain, first)]
    assert found.results == alone
    assert alone[0].hits != alone[2].hits
    assert found.metrics == evaluate(trace_set, [], sources=[two], measure=two).metrics
    assert [row.lookahead for row in found.metrics] == [2, 3]


def test_a_carried_cache_finds_the_sequences_as_one(trace_set: TraceSet) -> None:
    """Cold at the first sequence only: the same as one long sequence of them all."""
    source = seer("seer", (1,), backwards=True)
    experts = np.concatenate([trace.experts for trace in trace_set.traces()])
    scores = np.concatenate([foresight(trace, 1, 8) for trace in trace_set.traces()])
    for policy, prefetch in (("lru", "none"), ("belady", "none"), ("belief", "top2"), ("belady", "oracle")):
        settings = strategy(COMMON, 8, policy, prefetch, source)
        [found] = evaluate(trace_set, [replace(settings, carry_over=True)], sources=[source]).results
        replaying = Replay(trace_set.geometry, settings)
        replaying.add(experts, scores)
        assert counted(found) == counted(replaying.result()), policy
        assert counted(found) != counted(evaluate(trace_set, [settings], sources=[source]).results[0])


def test_batches_are_of_neighbours_in_the_traces(trace_set: TraceSet) -> None:
    source = seer("seer", (1,), backwards=True)
    settings = replace(strategy(COMMON, 20, "lru", "p>0.5", source), batch_size=5)  # 12 sequences: a last batch of two
    [found] = evaluate(trace_set, [settings], sources=[source]).results
    assert found == by_hand(trace_set, settings)
    assert counted(found) != counted(by_hand(trace_set, settings, backwards=True))


def test_a_predictor_scores_in_order_where_asked_to(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=20)
    source = from_predictor_folder(history_folder(tmp_path / "history", traces))
    ordered, batched = (list(source.sequences(traces, None, in_order)) for in_order in (True, False))
    names = [trace.sequence_id for trace in traces.traces()]
    assert [trace.sequence_id for trace, _ in ordered] == names
    assert [trace.sequence_id for trace, _ in batched] != names
    again = {trace.sequence_id: scores for trace, scores in batched}
    for trace, scores in ordered:
        assert scores.shape == (len(trace), 1, 4, 8)
        np.testing.assert_allclose(scores, again[trace.sequence_id], atol=1e-6)


def test_a_warm_up_longer_than_all_leaves_nothing(trace_set: TraceSet) -> None:
    with pytest.raises(UserError, match="--warmup-tokens 20: no sequence has more tokens"):
        evaluate(trace_set, [strategy(COMMON, 8, "lru"), strategy(replace(COMMON, warmup_tokens=20), 8, "lru")])


def test_a_split_alone(trace_set: TraceSet) -> None:
    source = seer()
    asked = [strategy(COMMON, 8, "lru", "top2", source), strategy(COMMON, 8, "static_hindsight")]
    parts = [evaluate(trace_set, asked, split, [source]).results for split in ("train", "validation")]
    whole = evaluate(trace_set, asked, None, [source]).results
    assert counted(whole[0]) == tuple(np.add(counted(parts[0][0]), counted(parts[1][0])))
    assert parts[0][1].accesses + parts[1][1].accesses == whole[1].accesses
    # Hindsight knows the counted tokens only.
    assert parts[0][1].hits + parts[1][1].hits >= whole[1].hits
