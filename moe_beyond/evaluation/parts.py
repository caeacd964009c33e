"""Replays of strategies on a part of a trace set, with metrics of the scores.

The outcomes of parts add up exactly to that of the whole: counts are integers, sums of times do not depend on their
order, and intervals sort their sequences.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.evaluation.sources import Scored, ScoreSource
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.bounds import Bound
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.simulator.settings import BOUNDS
from moe_beyond.simulator.totals import Totals
from moe_beyond.traces.manifest import ShardInfo
from moe_beyond.traces.reader import Facts, TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import UsageProfile

if TYPE_CHECKING:
    from moe_beyond.evaluation.measure import Measurement

BLOCK_TOKENS = 4096
"""Least number of tokens whose scores are in memory at once; strategies share a block, each on its own core."""


@dataclass(frozen=True)
class Known:
    """Demand that some strategies know before the first sequence, by the steps of their settings (`steps_of`).

    Attributes:
        streams: Demand of all sequences in order, for strategies that know the future and carry their cache over.
        uses: Demand of each expert, ``(L*E,)`` int64, for the best static choice.
    """

    streams: dict[tuple[int, ...], Stream]
    uses: dict[tuple[int, ...], npt.NDArray[np.int64]]


def known_demand(
    strategies: Iterable[ReplaySettings],
    stream: Callable[[ReplaySettings], Stream],
    uses: Callable[[ReplaySettings], npt.NDArray[np.int64]],
) -> Known:
    """Return the demand that strategies know, computed once for all that have the same steps.

    Args:
        strategies: Settings of each strategy.
        stream: Function from settings to the demand of all sequences in order.
        uses: Function from settings to the demand of each expert.
    """
    known = Known({}, {})
    for settings in strategies:
        steps = steps_of(settings)
        if settings.policy == "static_hindsight" and steps not in known.uses:
            known.uses[steps] = uses(settings)
        if settings.carry_over and "future" in settings.needs and steps not in known.streams:
            known.streams[steps] = stream(settings)
    return known


def steps_of(settings: ReplaySettings) -> tuple[int, ...]:
    """Return the settings that determine the steps of sequences."""
    return (
        settings.prefill_chunk,
        settings.batch_size,
        settings.window,
        settings.warmup_tokens,
        settings.sequential,
    )


def start(geometry: Geometry, settings: ReplaySettings, profile: UsageProfile | None, known: Known) -> Replay | Bound:
    """Return an empty replay.

    Args:
        geometry: Geometry of the model.
        settings: Settings of the strategy.
        profile: Usage profile of training text; None without one.
        known: Demand that the strategy may know.

    Raises:
        UserError: The strategy does not fit the model.
    """
    steps = steps_of(settings)
    if settings.policy in BOUNDS:
        return Bound(geometry, settings, known.uses.get(steps))
    return Replay(geometry, settings, profile, known.streams.get(steps))


@dataclass(frozen=True)
class Outcome:
    """Counts of a part of a trace set.

    Attributes:
        totals: Counts and times, one object per strategy.
        measurement: Metrics of the measured source; None if none is measured.
        facts: Facts of the shards, to compare with those that other processes read.
    """

    totals: list[Totals]
    measurement: Measurement | None
    facts: list[tuple[ShardInfo, Facts]]


@dataclass(frozen=True)
class Job:
    """Inputs of an evaluation of any part of a trace set; workers receive it.

    Attributes:
        traces: Trace set to replay.
        strategies: Settings of each strategy.
        sources: Sources of scores.
        measure: Source to measure, one of ``sources``; None for none.
        profile: Usage profile of training text; None without one.
        known: Demand that some strategies know.
        in_order: Whether the order of the sequences matters.
        bootstrap_draws: Number of bootstrap draws; 0 for none.
        workers: Number of processes that share the cores.
    """

    traces: TraceSet
    strategies: Sequence[ReplaySettings]
    sources: Sequence[ScoreSource]
    measure: ScoreSource | None
    profile: UsageProfile | None
    known: Known
    in_order: bool
    bootstrap_draws: int
    workers: int

    def replays(self) -> list[Replay | Bound]:
        """Return an empty replay of each strategy."""
        return [start(self.traces.geometry, settings, self.profile, self.known) for settings in self.strategies]

    def measurement(self) -> Measurement | None:
        """Return empty metrics of the measured source; None if none is measured."""
        if self.measure is None:
            return None
        from moe_beyond.evaluation.measure import Measurement  # imports torch, which a plain replay does not need

        return Measurement(self.measure, self.traces.geometry, self.bootstrap_draws)

    def run(self, part: tuple[ShardInfo, ...], progress: Callable[[int], object] = lambda tokens: None) -> Outcome:
        """Measure scores and replay strategies on some shards.

        Args:
            part: Shards to replay.
            progress: Function that receives the number of tokens that one strategy finished (default: no progress).
        """
        geometry, traces, measure = self.traces.geometry, self.traces, self.measure
        replays, measurement = self.replays(), self.measurement()
        used = {settings.predictor for settings in self.strategies}
        passes = [source for source in self.sources if source is measure or source.name in used]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // self.workers)) as pool:
            for number, source in enumerate(passes or [None]):
                share = [r for r in replays if r.settings.predictor == (source.name if source else None)]
                if number == 0 and source is not None:
                    share += [r for r in replays if r.settings.predictor is None]
                if not share and source is not measure:
                    continue
                for block in _blocks(
                    _unscored(traces, part) if source is None else source.sequences(traces, part, self.in_order)
                ):
                    if measurement is not None and source is measure:
                        for trace, scores in block:
                            if scores is not None:
                                measurement.add(trace, scores)
                    sequences = [as_sequence(geometry, trace, scores) for trace, scores in block]
                    for _ in pool.map(lambda replay, part=sequences: add_all(replay, part), share):
                        progress(sum(map(len, sequences)))
            totals = list(pool.map(lambda replay: replay.totals(), replays))
        return Outcome(totals, measurement, traces.facts(part))


def _unscored(traces: TraceSet, part: tuple[ShardInfo, ...]) -> Iterator[tuple[Trace, None]]:
    return ((trace, None) for trace in traces.traces(part))


def as_sequence(geometry: Geometry, trace: Trace, scores: npt.NDArray[np.float32] | None = None) -> ReplaySequence:
    """Return a trace with its scores as a sequence of a replay.

    Args:
        geometry: Geometry of the model.
        trace: Trace of the sequence.
        scores: ``(T, H, L, E)`` float32 (default: none).
    """
    return ReplaySequence(geometry, trace.experts, scores, trace.decode_start, trace.sequence_id)


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


def add_all(replay: Replay | Bound, sequences: Sequence[ReplaySequence]) -> None:
    """Replay sequences."""
    for sequence in sequences:
        replay.add_sequence(sequence)
