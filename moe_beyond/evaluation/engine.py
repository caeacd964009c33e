"""Replays of strategies on traces, with metrics of the scores, in one pass over the traces per source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.errors import UserError
from moe_beyond.evaluation.bootstrap import check_bootstrap_draws, result_intervals
from moe_beyond.evaluation.parts import Job, add_all, as_sequence, known_demand, start
from moe_beyond.evaluation.results import Evaluation
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.bounds import demand
from moe_beyond.simulator.sequence import Grouping, ReplaySequence
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile
from moe_beyond.workers import Workers


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
    workers: int = 1,
) -> Evaluation:
    """Measure scores and replay strategies, each on its own core.

    The traces are read once per source that a strategy names or that is measured, and once before if a strategy knows
    the demand of all sequences.

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
        workers: Number of processes that share the shards; one replays a cache that is carried over, or batches of
            sequences (default: 1).

    Raises:
        UserError: A source does not fit the traces, a strategy does not fit the model or lacks scores, or the warm-up
            excludes every token.
    """
    _check_sources(strategies, sources)
    check_bootstrap_draws(bootstrap_draws)
    used = {settings.predictor for settings in strategies}
    for source in sources:
        if source is measure or source.name in used:
            source.check(traces)
    geometry, shards = traces.geometry, traces.shards(split)
    in_order = any(settings.carry_over or settings.batch_size > 1 for settings in strategies)
    parts = [shards] if in_order or workers == 1 else [(shard,) for shard in shards]
    with Workers(min(workers, len(parts))) as pool:

        def whole(settings: ReplaySettings) -> Stream:
            return whole_stream((as_sequence(geometry, trace) for trace in traces.traces(shards)), settings)

        def uses(settings: ReplaySettings) -> npt.NDArray[np.int64]:
            counts = pool.map(_demand, (traces, settings), parts)
            return sum(counts, np.zeros(geometry.total_experts, np.int64))

        known = known_demand(strategies, whole, uses)
        job = Job(traces, strategies, sources, measure, profile, known, in_order, bootstrap_draws, pool.number)
        replays, measurement = job.replays(), job.measurement()
        outcomes = iter([job.run(shards, progress)]) if len(parts) == 1 else pool.map(Job.run, job, parts)
        for part, outcome in zip(parts, outcomes, strict=True):
            for info, facts in outcome.facts:
                traces.compare(info, facts)
            for replay, totals in zip(replays, outcome.totals, strict=True):
                replay.absorb(totals)
            if measurement is not None and outcome.measurement is not None:
                measurement.absorb(outcome.measurement)
            if len(parts) > 1:
                progress(len(strategies) * sum(info.tokens for info in part))
    results = [replay.result() for replay in replays]
    _check_counted(results, strategies)
    rows = [] if measurement is None else measurement.rows()
    if bootstrap_draws:
        results = result_intervals(results, [replay.totals().sums for replay in replays], bootstrap_draws)
    return Evaluation(rows, results, bootstrap_draws)


def _demand(inputs: tuple[TraceSet, ReplaySettings], part: tuple[ShardInfo, ...]) -> npt.NDArray[np.int64]:
    traces, settings = inputs
    return demand(traces.geometry, settings, (as_sequence(traces.geometry, trace) for trace in traces.traces(part)))


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
    uses = partial(demand, geometry, sequences=sequences)
    known = known_demand(strategies, partial(whole_stream, sequences), uses)
    replays = [start(geometry, settings, profile, known) for settings in strategies]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda replay: add_all(replay, sequences), replays):
            pass
        results = list(pool.map(lambda replay: replay.result(), replays))
    _check_counted(results, strategies)
    if not bootstrap_draws:
        return results
    return result_intervals(results, [replay.totals().sums for replay in replays], bootstrap_draws)


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


def _check_counted(results: Sequence[Result], strategies: Sequence[ReplaySettings]) -> None:
    pairs = zip(results, strategies, strict=True)
    if empty := next((settings for result, settings in pairs if result.accesses == 0), None):
        raise UserError(
            f"--warmup-tokens {empty.warmup_tokens}: no sequence has more tokens, so nothing counts; give fewer"
        )
