"""Traces and scores in; metrics of the scores, and replays of what they are worth under a budget, out."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.errors import UserError
from moe_beyond.evaluation.bootstrap import RecallSums, check_resamples, recall_intervals, result_intervals
from moe_beyond.evaluation.sources import Scored, ScoreSource
from moe_beyond.metrics import RoutingMetrics
from moe_beyond.predictors.batch import collate
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.bounds import Bound
from moe_beyond.simulator.sequence import Grouping, ReplaySequence
from moe_beyond.simulator.settings import BOUNDS
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import UsageProfile

BLOCK_TOKENS = 4096
"""Tokens whose scores are in memory at once, at least; strategies share a block, each on a core of its own."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: One object a lookahead, as `RoutingMetrics.to_rows` gives them; empty where none were asked for.
        results: One record a strategy, in the order asked for.
        resamples: Draws of sequences that ``intervals`` in both are of; 0 where there are none.
    """

    metrics: list[dict[str, Any]]
    results: list[Result]
    resamples: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        drawn = {"resamples": self.resamples} if self.resamples else {}
        return {"metrics": self.metrics, "results": [result.to_json() for result in self.results], **drawn}


def evaluate(
    traces: TraceSet,
    strategies: Sequence[ReplaySettings],
    split: str | None = None,
    sources: Sequence[ScoreSource] = (),
    *,
    measure: ScoreSource | None = None,
    profile: UsageProfile | None = None,
    resamples: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Measure scores, and replay every strategy, each on a core of its own.

    The traces are gone over once for every source that a strategy names or that is measured.

    Args:
        traces: What to replay.
        strategies: How.
        split: One split, or all.
        sources: Of the scores, by the names that strategies call their predictors.
        measure: The one of them to measure.
        profile: What is known of training text.
        resamples: Draws of sequences for 95 % intervals (`moe_beyond.evaluation.bootstrap`); 0 for none.
        progress: Called with the tokens that were gone over, times the share of the strategies that did.

    Raises:
        UserError: A source does not fit the traces, a strategy does not fit the model or lacks something, or the
            warm-up leaves nothing to count.
    """
    _check_sources(strategies, sources)
    check_resamples(resamples)
    geometry = traces.geometry
    streams: dict[tuple[int, ...], Stream] = {}
    replays = [_begin(traces, settings, split, profile, streams) for settings in strategies]
    passes = [source for source in sources if source is measure or source.name in {s.predictor for s in strategies}]
    metrics = None if measure is None else RoutingMetrics(len(measure.lookaheads), *geometry.shape())
    recall = RecallSums()
    in_order = any(settings.carry_over or settings.batch_size > 1 for settings in strategies)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, source in enumerate(passes or [None]):
            share = [r for r in replays if r.settings.predictor == (source.name if source else None)]
            if number == 0 and source is not None:
                share += [r for r in replays if r.settings.predictor is None]
            if share or source is measure:
                found = _unscored(traces, split) if source is None else source.sequences(traces, split, in_order)
                for block in _blocks(found):
                    if metrics is not None and source is measure:
                        for trace, scores in block:
                            _measure(metrics, trace, scores, recall if resamples else None)
                    sequences = [
                        ReplaySequence(geometry, t.experts, s, t.decode_start, t.sequence_id) for t, s in block
                    ]
                    for _ in pool.map(lambda replaying, part=sequences: _add(replaying, part), share):
                        progress(sum(map(len, sequences)))
    rows = [] if metrics is None or measure is None else metrics.to_rows(measure.lookaheads, geometry.moe_layers)
    rows = [{**row, "causal": measure.causal} for row in rows if measure is not None]
    results = _results(replays)
    if resamples:
        ends = recall_intervals(recall, resamples) if rows else []
        rows = [{**row, "intervals": {"recall_at_k": found}} for row, found in zip(rows, ends, strict=True)]
        results = result_intervals(results, [replaying.sums for replaying in replays], resamples)
    return Evaluation(rows, results, resamples)


def _check_sources(strategies: Sequence[ReplaySettings], sources: Sequence[ScoreSource]) -> None:
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two sources of scores are called {twice!r}; give one of them another name")
    for settings in strategies:
        if settings.predictor is not None and settings.predictor not in names:
            raise UserError(f"strategy {settings.strategy}: the scores of {settings.predictor!r} are not given")


def _begin(
    traces: TraceSet,
    settings: ReplaySettings,
    split: str | None,
    profile: UsageProfile | None,
    streams: dict[tuple[int, ...], Stream],
) -> Replay | Bound:
    if settings.policy in BOUNDS:
        return Bound(traces.geometry, settings)
    stream = None
    if settings.carry_over and "future" in settings.needs:
        key = (
            settings.prefill_chunk,
            settings.batch_size,
            settings.window,
            settings.warmup_tokens,
            settings.sequential,
        )
        if key not in streams:
            streams[key] = _whole_stream(traces, settings, split)
        stream = streams[key]
    return Replay(traces.geometry, settings, profile, stream)


def _whole_stream(traces: TraceSet, settings: ReplaySettings, split: str | None) -> Stream:
    """Return the demands of all sequences in a row, grouped as a replay groups them."""
    grouping = Grouping(settings)
    sequences = (
        ReplaySequence(traces.geometry, t.experts, None, t.decode_start, t.sequence_id) for t in traces.traces(split)
    )
    groups = [group for sequence in sequences for group in grouping.add(sequence)]
    parts = [group.stream for group in (*groups, *grouping.flush())]
    if not parts:
        return Stream(np.zeros(0, np.int64), np.zeros(1, np.int64))
    begins = np.cumsum([0] + [len(part.ids) for part in parts])
    offsets = [part.offsets[:-1] + begin for part, begin in zip(parts, begins[:-1], strict=True)]
    return Stream(np.concatenate([part.ids for part in parts]), np.concatenate([*offsets, begins[-1:]]))


def _unscored(traces: TraceSet, split: str | None) -> Iterator[tuple[Trace, None]]:
    return ((trace, None) for trace in traces.traces(split))


def _blocks(found: Iterable[Scored | tuple[Trace, None]]) -> Iterator[list[Scored | tuple[Trace, None]]]:
    """Gather sequences until they have some thousand tokens."""
    block: list[Scored | tuple[Trace, None]] = []
    tokens = 0
    for one in found:
        block.append(one)
        tokens += len(one[0])
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _measure(metrics: RoutingMetrics, trace: Trace, scores: Any, recall: RecallSums | None) -> None:
    """Add a sequence to the metrics, and its part to recall's sums, if there are any."""
    batch, experts = collate([trace]), scores.shape[-1]
    found, named = metrics.found.clone(), metrics.chosen.sum(-1)
    metrics.update(torch.from_numpy(scores)[None], batch.targets(experts), batch.mask, batch.gate_shares(experts))
    if recall is not None:
        recall.names.append(trace.sequence_id)
        recall.found.append((metrics.found - found).double().numpy())
        recall.named.append((metrics.chosen.sum(-1) - named).double().numpy())


def _add(replaying: Replay | Bound, sequences: Sequence[ReplaySequence]) -> None:
    for sequence in sequences:
        replaying.add_sequence(sequence)


def _results(replays: Sequence[Replay | Bound]) -> list[Result]:
    results = [replaying.result() for replaying in replays]
    if empty := next((result for result in results if result.accesses == 0), None):
        warmup = replays[results.index(empty)].settings.warmup_tokens
        raise UserError(f"--warmup-tokens {warmup}: no sequence is longer, so there is nothing to count")
    return results
