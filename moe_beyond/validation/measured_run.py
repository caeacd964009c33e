"""The measurements of a run that ``moe-beyond run --trace`` recorded."""

from collections import defaultdict
from dataclasses import replace

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import from_predictor
from moe_beyond.runtime.records.as_run import recorded_strategy
from moe_beyond.runtime.records.recording import Recording
from moe_beyond.runtime.stepping.telemetry import EventRow, TransferRow
from moe_beyond.runtime.strategy import RunStrategy
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.validation.measured import (
    CACHE,
    EXPERTS,
    FIXED,
    LAYERS,
    LINK,
    PREDICTOR,
    Floats,
    LinkTimes,
    Measured,
    expert_bytes,
)
from moe_beyond.validation.stepped_scores import stepped_scores


def measured_run(recording: Recording) -> Measured:
    """Return the measurements of a recorded run.

    Args:
        recording: Recording of a run.

    Raises:
        UserError: The telemetry belongs to other traces, a forward is no step of a replay, or the predictor of the run
            is not found.
    """
    traces, strategy = recording.traces, recorded_strategy(recording)
    geometry, folder = traces.geometry, str(traces.folder)
    sequences = _sequences(recording, strategy)
    _check_steps(recording, sequences)
    shape = (len(recording.steps), geometry.num_layers)
    events = _columns(recording.events, shape)
    link = _link_times(recording, shape, expert_bytes(geometry, traces.manifest.bits))
    seconds = np.array([step.seconds for step in recording.steps])
    parts = {
        LINK: events["wait_s"].sum(1),
        EXPERTS: events["compute_s"].sum(1),
        LAYERS: _layers(events),
        CACHE: events["cache_s"].sum(1),
        PREDICTOR: events["predictor_s"].sum(1),
    }
    parts[FIXED] = seconds - sum(parts.values())
    longest = max(sequence.decode_start for sequence in sequences)
    return Measured(
        name=folder,
        geometry=geometry,
        settings=replace(strategy.settings, prefill_chunk=longest, measured_times=False),
        profile=strategy.profile,
        sequences=sequences,
        counts=np.stack([events[name] for name in ("hits", "late_hits", "misses")], axis=2).astype(np.int64),
        transfers=link.demanded + link.prefetched,
        read_bytes=link.demanded_bytes + link.prefetched_bytes,
        generated=np.array([step.tokens == 1 and step.seconds > 0 for step in recording.steps]),
        seconds=seconds,
        parts=parts,
        link=link,
    )


def _sequences(recording: Recording, strategy: RunStrategy) -> tuple[ReplaySequence, ...]:
    """Return the sequences of a run, with the scores that its predictor had step by step."""
    traces, geometry = recording.traces, recording.traces.geometry
    if strategy.predictor is None:
        return tuple(
            ReplaySequence(geometry, trace.experts, None, trace.decode_start, trace.sequence_id) for trace in traces
        )
    source = from_predictor(strategy.predictor, strategy.settings.predictor or "predictor")
    sequences = []
    for trace, batch in source.sequences(traces, None, True):
        scores, after = stepped_scores(strategy.predictor, trace, batch)
        sequences.append(
            ReplaySequence(geometry, trace.experts, scores, trace.decode_start, trace.sequence_id, scores_after=after)
        )
    return tuple(sequences)


def _check_steps(recording: Recording, sequences: tuple[ReplaySequence, ...]) -> None:
    """Check that every prompt was read in one forward, and every other token in one of its own.

    Raises:
        UserError: The forwards are no steps of a replay, or there is no telemetry.
    """
    folder = recording.traces.folder
    expected = [
        (number, tokens)
        for number, sequence in enumerate(sequences)
        for tokens in (max(sequence.decode_start, 1), *[1] * (len(sequence) - max(sequence.decode_start, 1)))
    ]
    if not recording.steps:
        raise UserError(f"{folder}: has no telemetry of forwards; record the run again with --trace")
    if [(step.sequence, step.tokens) for step in recording.steps] != expected:
        raise UserError(
            f"{folder}: its telemetry has other steps than its traces (got {len(recording.steps):,} forwards); "
            "record the run again, with every prompt in one forward"
        )
    if len(recording.events) != len(recording.steps) * recording.traces.geometry.num_layers:
        raise UserError(f"{folder}: its telemetry is incomplete; record the run again")
    experts, events = recording.traces.geometry.total_experts, len(recording.events)
    for row in recording.transfers:
        if not 0 <= row.expert < experts or not (not row.prefetch) <= row.event <= events:
            raise UserError(
                f"{folder}: its telemetry has a transfer of expert {row.expert} in event {row.event}, which do not "
                "exist; record the run again"
            )


def _columns(events: list[EventRow], shape: tuple[int, int]) -> dict[str, Floats]:
    """Return the columns of events that are compared, each ``(S, L)`` float64."""
    names = ("hits", "late_hits", "misses", "cache_s", "predictor_s", "wait_s", "compute_s", "now_s")
    return {name: np.array([getattr(row, name) for row in events], np.float64).reshape(shape) for name in names}


def _layers(events: dict[str, Floats]) -> Floats:
    """Return the seconds of layers without their experts, ``(S,)``.

    The time from the end of one event to the begin of the next is measured L - 1 times per step. The layers' other
    halves, before the first event and after the last one, are taken to be a layer of mean time.
    """
    layers = events["now_s"].shape[1]
    if layers == 1:
        return np.zeros(len(events["now_s"]))
    ends = sum(events[name] for name in ("now_s", "predictor_s", "cache_s", "wait_s", "compute_s"))
    gaps: Floats = events["now_s"][:, 1:] - np.asarray(ends)[:, :-1]
    mean: Floats = gaps.sum(1) * layers / (layers - 1)
    return mean


def _link_times(recording: Recording, shape: tuple[int, int], sizes: Floats) -> LinkTimes:
    """Return number, bytes and seconds of each step's transfers.

    Transfers on demand of an event overlap: their seconds are the time from the request to the last arrival. Prefetches
    follow each other.
    """
    steps, layers = shape
    numbers, read_bytes, seconds = np.zeros((2, steps), np.int64), np.zeros((2, steps)), np.zeros((2, steps))
    demanded: dict[int, list[TransferRow]] = defaultdict(list)
    for row in recording.transfers:
        step = min(max(row.event - (not row.prefetch), 0) // layers, steps - 1)
        numbers[int(row.prefetch), step] += 1
        read_bytes[int(row.prefetch), step] += sizes[row.expert // recording.traces.geometry.num_experts]
        if row.prefetch:
            seconds[1, step] += row.read_s + row.copy_s
        else:
            demanded[row.event].append(row)
    for event, rows in demanded.items():
        seconds[0, (event - 1) // layers] += max(row.wait_s + row.read_s + row.copy_s for row in rows)
    return LinkTimes(numbers[0], read_bytes[0], seconds[0], numbers[1], read_bytes[1], seconds[1])
