"""The forecast of a recording by the clock: its strategy, replayed on a device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_beyond.cache.counters import Counter
from moe_beyond.cache.steps import EventRecord
from moe_beyond.errors import UserError
from moe_beyond.evaluation.engine import whole_stream
from moe_beyond.simulator import Replay
from moe_beyond.simulator.devices import Device
from moe_beyond.validation.measured import (
    CACHE,
    COMPUTING,
    EXPERTS,
    FIXED,
    LAYERS,
    LINK,
    PREDICTOR,
    TRANSFERS,
    Floats,
    Ints,
    Measured,
    expert_bytes,
)

COUNTS = (EventRecord.HITS, EventRecord.LATE_HITS, EventRecord.MISSES)


@dataclass(frozen=True)
class Forecast:
    """A replay with times; S steps, L layers.

    Attributes:
        counts: Hits, late hits and misses of every event, ``(S, L, 3)`` int64.
        stalls: Stall of every event in seconds, ``(S, L)`` float64.
        read_bytes: Bytes of all transfers.
        seconds: Time of each step, ``(S,)`` float64.
        parts: Part of the time -> seconds of each step, ``(S,)`` float64, with the parts of the measurements.
    """

    counts: Ints
    stalls: Floats
    read_bytes: float
    seconds: Floats
    parts: Mapping[str, Floats]


def forecast(measured: Measured, device: Device, upkeep: Mapping[str, float]) -> Forecast:
    """Replay a recording on a device.

    Args:
        measured: Measurements of a recording.
        device: Device of the clock.
        upkeep: Part of a layer's fixed cost -> seconds per layer, as a `moe_beyond.validation.fit.Fit` has them.

    Raises:
        UserError: The strategy does not fit the model.
    """
    geometry, settings = measured.geometry, replace(measured.settings, device=device)
    stream = whole_stream(measured.sequences, settings) if "future" in settings.needs else None
    replay = Replay(geometry, settings, measured.profile, stream)
    events = np.concatenate([replay.watch(sequence)[0] for sequence in measured.sequences])
    events = events.reshape(-1, geometry.num_layers, len(EventRecord))
    if len(events) != len(measured.seconds):
        raise UserError(f"{measured.name}: its metrics or telemetry have other steps than its traces; record it again")
    stall, computing = np.concatenate(replay.times.stall_compute).T
    timings = [replay.timing(sequence.as_group(settings)) for sequence in measured.sequences]
    layers = geometry.num_layers * np.concatenate([timing.layer for timing in timings])
    outside = np.concatenate([timing.outside for timing in timings])
    counters = replay.counts()
    moved = counters[:, Counter.DEMAND_TRANSFERS] + counters[:, Counter.PREFETCH_TRANSFERS]
    if measured.link is None:
        parts = {TRANSFERS: stall + outside, COMPUTING: computing - outside}
    else:
        kept = {name: np.full(len(stall), geometry.num_layers * upkeep.get(name, 0.0)) for name in (CACHE, PREDICTOR)}
        parts = {
            LINK: stall,
            EXPERTS: computing - layers - outside,
            LAYERS: layers - sum(kept.values()),
            **kept,
            FIXED: outside,
        }
    return Forecast(
        counts=events[:, :, COUNTS].astype(np.int64),
        stalls=events[:, :, EventRecord.STALL],
        read_bytes=float(moved @ expert_bytes(geometry, settings.bits)),
        seconds=stall + computing,
        parts=parts,
    )
