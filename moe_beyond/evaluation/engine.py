"""Replays of strategies on traces, with metrics of the scores, in one pass over the traces per source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.errors import UserError
from moe_beyond.evaluation.bootstrap import check_bootstrap_draws, result_intervals
from moe_beyond.evaluation.results import Evaluation
from moe_beyond.evaluation.sources import Scored, ScoreSource
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.bounds import Bound
from moe_beyond.simulator.sequence import Grouping, ReplaySequence
from moe_beyond.simulator.settings import BOUNDS
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import UsageProfile

if TYPE_CHECKING:
    from moe_beyond.evaluation.measure import Measurement

BLOCK_TOKENS = 4096
"""Least number of tokens whose scores are in memory at once; strategies share a block, each on its own core."""


def evaluate(
    traces: TraceSet,
    strategies: Sequence[ReplaySettings],
    split: str | None = None,
    sources: Sequence[ScoreSource] = (),
    *,
    measure: ScoreSource | None = None,
    profile: UsageProfile | None = None,
    bootstrap_draws: int = 0,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Evaluation:
    """Measure scores and replay strategies, each on its own core.

    The traces are read once per source that a strategy names or that is measured.

    Args:
        traces: Trace set to replay.
        strategies: Settings of each strategy.
        split: Name of a split (default: all splits).
        sources: Sources of scores, by the names in the settings' ``predictor`` (default: none).
        measure: Source to measure, one of ``sources`` (default: none).
        profile: Usage profile of training text (default: none).
        bootstrap_draws: Number of bootstrap draws for 95 % intervals (`moe_beyond.evaluation.bootstrap`); 0 for none
            (default: 0).
        progress: Function that receives the number of tokens that one strategy finished (default: no progress).

    Raises:
        UserError: A source does not fit the traces, a strategy does not fit the model or lacks scores, or the warm-up
            excludes every token.
    """
    _check_sources(strategies, sources)
    check_bootstrap_draws(bootstrap_draws)
    geometry = traces.geometry
    streams: dict[tuple[int, ...], Stream] = {}

    def unscored() -> Iterator[ReplaySequence]:
        for trace in traces.traces(split):
            yield ReplaySequence(geometry, trace.experts, None, trace.decode_start, trace.sequence_id)

    replays = [_start(geometry, settings, profile, streams, unscored) for settings in strategies]
    passes = [source for source in sources if source is measure or source.name in {s.predictor for s in strategies}]
    measurement = None if measure is None else _measurement(measure, traces, bootstrap_draws)
    in_order = any(settings.carry_over or settings.batch_size > 1 for settings in strategies)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, source in enumerate(passes or [None]):
            share = [r for r in replays if r.settings.predictor == (source.name if source else None)]
            if number == 0 and source is not None:
                share += [r for r in replays if r.settings.predictor is None]
            if not share and source is not measure:
                continue
            for block in _blocks(
                _unscored(traces, split) if source is None else source.sequences(traces, split, in_order)
            ):
                if measurement is not None and source is measure:
                    for trace, scores in block:
                        if scores is not None:
                            measurement.add(trace, scores)
                sequences = [ReplaySequence(geometry, t.experts, s, t.decode_start, t.sequence_id) for t, s in block]
                for _ in pool.map(lambda replay, part=sequences: _add(replay, part), share):
                    progress(sum(map(len, sequences)))
        results = list(pool.map(lambda replay: replay.result(), replays))
    _check_counted(results, strategies)
    rows = [] if measurement is None else measurement.rows()
    if bootstrap_draws:
        results = result_intervals(results, [replay.sums for replay in replays], bootstrap_draws)
    return Evaluation(rows, results, bootstrap_draws)


def _measurement(source: ScoreSource, traces: TraceSet, bootstrap_draws: int) -> Measurement:
    from moe_beyond.evaluation.measure import Measurement  # imports torch, which a plain replay does not need

    return Measurement(source, traces.geometry, bootstrap_draws)


def _check_sources(strategies: Sequence[ReplaySettings], sources: Sequence[ScoreSource]) -> None:
    names = [source.name for source in sources]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"evaluate: two sources of scores have the name {repeated!r}; rename one")
    for settings in strategies:
        if settings.predictor is not None and settings.predictor not in names:
            raise UserError(
                f"strategy {settings.strategy}: the scores of {settings.predictor!r} are missing; add their source"
            )


def replay_sequences(
    geometry: Geometry,
    strategies: Sequence[ReplaySettings],
    sequences: Sequence[ReplaySequence],
    profile: UsageProfile | None = None,
    bootstrap_draws: int = 0,
) -> list[Result]:
    """Replay strategies on sequences in memory, each strategy on its own core.

    Args:
        geometry: Geometry of the model.
        strategies: Settings of each strategy.
        sequences: Sequences, with scores if a strategy reads them.
        profile: Usage profile of training text (default: none).
        bootstrap_draws: Number of bootstrap draws for 95 % intervals; 0 for none (default: 0).

    Raises:
        UserError: A strategy does not fit the model or lacks scores, or the warm-up excludes every token.
    """
    streams: dict[tuple[int, ...], Stream] = {}
    replays = [_start(geometry, settings, profile, streams, lambda: sequences) for settings in strategies]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda replay: _add(replay, sequences), replays):
            pass
        results = list(pool.map(lambda replay: replay.result(), replays))
    _check_counted(results, strategies)
    return result_intervals(results, [each.sums for each in replays], bootstrap_draws) if bootstrap_draws else results


def _start(
    geometry: Geometry,
    settings: ReplaySettings,
    profile: UsageProfile | None,
    streams: dict[tuple[int, ...], Stream],
    sequences: Callable[[], Iterable[ReplaySequence]],
) -> Replay | Bound:
    """Start a replay; ``streams`` keeps the demands of all sequences for replays that group them alike."""
    if settings.policy in BOUNDS:
        return Bound(geometry, settings)
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
            streams[key] = whole_stream(sequences(), settings)
        stream = streams[key]
    return Replay(geometry, settings, profile, stream)


def whole_stream(sequences: Iterable[ReplaySequence], settings: ReplaySettings) -> Stream:
    """Return the demands of all sequences in order, grouped as a replay groups them.

    Args:
        sequences: Sequences that a replay adds one after another.
        settings: Settings of the replay.
    """
    grouping = Grouping(settings)
    groups = [group for sequence in sequences for group in grouping.add(sequence)]
    parts = [group.stream for group in (*groups, *grouping.flush())]
    if not parts:
        return Stream(np.zeros(0, np.int64), np.zeros(1, np.int64))
    starts = np.cumsum([0] + [len(part.ids) for part in parts])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return Stream(np.concatenate([part.ids for part in parts]), np.concatenate([*offsets, starts[-1:]]))


def _unscored(traces: TraceSet, split: str | None) -> Iterator[tuple[Trace, None]]:
    return ((trace, None) for trace in traces.traces(split))


def _blocks(sequences: Iterable[Scored | tuple[Trace, None]]) -> Iterator[list[Scored | tuple[Trace, None]]]:
    """Group sequences into blocks of at least `BLOCK_TOKENS` tokens."""
    block: list[Scored | tuple[Trace, None]] = []
    tokens = 0
    for sequence in sequences:
        block.append(sequence)
        tokens += len(sequence[0])
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _add(replay: Replay | Bound, sequences: Sequence[ReplaySequence]) -> None:
    for sequence in sequences:
        replay.add_sequence(sequence)


def _check_counted(results: Sequence[Result], strategies: Sequence[ReplaySettings]) -> None:
    pairs = zip(results, strategies, strict=True)
    if empty := next((settings for result, settings in pairs if result.accesses == 0), None):
        raise UserError(
            f"--warmup-tokens {empty.warmup_tokens}: no sequence has more tokens, so nothing counts; give fewer"
        )
