"""Timeline of one token: its computing, its stalls, and its transfers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.interconnect import Transfer
from moe_beyond.cache.misses import MOVE
from moe_beyond.cache.steps import EventRecord
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.replay import Replay
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.usage_profile import UsageProfile

Spans = list[tuple[float, float]]
"""Begin and end of each span, in seconds of the replay."""


@dataclass(frozen=True)
class Timeline:
    """Spans of one token.

    Attributes:
        token: Position of the token in the sequence.
        begins: Time at which it started.
        ends: Time at which its computing ended.
        layers: Time at which each layer began, ``L`` numbers.
        computing: Spans of computing. Each layer has one before its routing, and one or more of its experts, with a
            stall between two of them. After the last layer there is one for dense layers, head and fixed cost, if they
            take time.
        stalls: Spans in which nothing computes, because no demanded expert has arrived. If the host computes misses,
            the stall of a layer is shown at its end.
        demand_transfers: Transfers on demand.
        prefetch_transfers: Prefetches, including those issued in this token that arrive after it.
    """

    token: int
    begins: float
    ends: float
    layers: list[float]
    computing: Spans
    stalls: Spans
    demand_transfers: Spans
    prefetch_transfers: Spans


def timeline(
    geometry: Geometry, settings: ReplaySettings, sequence: ReplaySequence, token: int, profile: UsageProfile | None
) -> Timeline:
    """Replay a sequence from a cold cache and return the timeline of one token.

    Args:
        geometry: Geometry of the model.
        settings: Strategy, with a device, in which every token is a step.
        sequence: Sequence to replay.
        token: Position of the token.
        profile: Usage profile of training text, or None.

    Raises:
        UserError: There is no device, or no such token.
    """
    if settings.device is None:
        raise UserError("a timeline needs a device; give --device")
    if not 0 <= token < len(sequence):
        raise UserError(f"token must be within 0..{len(sequence) - 1}, the tokens of the sequence (got {token})")
    replaying = Replay(geometry, settings, profile)
    events, log = replaying.watch(sequence)
    layers = geometry.num_layers
    places = range(token * layers, (token + 1) * layers)
    routed, ended = events[places][:, (EventRecord.ROUTED, EventRecord.ENDED)].T
    group = sequence.as_group(settings)
    timing = replaying.timing(group)
    begins, ends = float(routed[0] - timing.layer[token]), float(ended[-1] + timing.outside[token])
    computing: Spans = []
    stalls: Spans = []
    before = begins
    for place in places:
        computing.append((before, float(events[place, EventRecord.ROUTED])))
        stream = group.stream
        ids = stream.ids[stream.offsets[place] : stream.offsets[place + 1]]
        if settings.misses == MOVE:
            experts, waits = _experts(events[place], ids, log, timing.overlap)
        else:
            experts, waits = _beside_host(events[place])
        computing += experts
        stalls += waits
        before = float(events[place, EventRecord.ENDED])
    if ends > ended[-1]:
        computing.append((float(ended[-1]), ends))
    during = log[(log[:, Transfer.END] > begins) & (log[:, Transfer.BEGIN] < ends)]
    prefetched = during[:, Transfer.PREFETCH] == 1
    return Timeline(
        token=token,
        begins=begins,
        ends=ends,
        layers=[begins, *events[places][:-1, EventRecord.ENDED].tolist()],
        computing=computing,
        stalls=stalls,
        demand_transfers=[(row[Transfer.BEGIN], row[Transfer.END]) for row in during[~prefetched]],
        prefetch_transfers=[(row[Transfer.BEGIN], row[Transfer.END]) for row in during[prefetched]],
    )


def _beside_host(event: npt.NDArray[np.float64]) -> tuple[Spans, Spans]:
    """Return the span in which device and host compute an event, and that of its stall, as `_experts` does."""
    routed, ended = float(event[EventRecord.ROUTED]), float(event[EventRecord.ENDED])
    waits = ended - float(event[EventRecord.STALL])
    return [(routed, waits)] if waits > routed else [], [(waits, ended)] if ended > waits else []


def _experts(
    event: npt.NDArray[np.float64], experts: npt.NDArray[np.int64], log: npt.NDArray[np.float64], overlap: float
) -> tuple[Spans, Spans]:
    """Return the spans in which an event's experts compute, and those of its stalls.

    Args:
        event: Record of the event, ``(7,)``, columns `EventRecord`.
        experts: Demanded experts, ``(n,)``.
        log: Log of the interconnect, ``(m, 4)``, columns `moe_beyond.cache.interconnect.Transfer`.
        overlap: Share of an expert's computing that can begin before all experts have arrived.
    """
    routed, ended = float(event[EventRecord.ROUTED]), float(event[EventRecord.ENDED])
    during = (log[:, Transfer.END] > routed) & (log[:, Transfer.END] <= ended)
    awaited = log[during & np.isin(log[:, Transfer.EXPERT], experts), Transfer.END].tolist()
    each = overlap * (ended - routed - float(event[EventRecord.STALL])) / max(len(experts), 1)
    computing: Spans = []
    stalls: Spans = []
    begins = now = routed
    for arrival in sorted([routed] * (len(experts) - len(awaited)) + awaited):
        if arrival > now:
            if now > begins:
                computing.append((begins, now))
            stalls.append((now, arrival))
            begins = now = arrival
        now += each
    if ended > begins:
        computing.append((begins, ended))
    return computing, stalls
