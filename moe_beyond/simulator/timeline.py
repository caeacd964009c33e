"""Timeline of one token: its computing, its stalls, and its transfers."""

from dataclasses import dataclass

import numpy as np

from moe_beyond.cache.interconnect import Transfer
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
        computing: Spans of computing, two per layer: before the routing, and the experts; and one after the last layer
            for dense layers, head and fixed cost, if they take time.
        stalls: Spans of waiting for experts.
        demand_transfers: Transfers on demand.
        prefetch_transfers: Prefetches, including those issued in this token that arrive after it.
    """

    token: int
    begins: float
    ends: float
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
    times = (EventRecord.ROUTED, EventRecord.READY, EventRecord.ENDED)
    routed, ready, ended = events[token * layers : (token + 1) * layers, times].T
    timing = replaying.timing(sequence.as_group(settings))
    begins, ends = float(routed[0] - timing.layer[token]), float(ended[-1] + timing.outside[token])
    before = np.concatenate([[begins], ended[:-1]])
    computing = [span for a, b, c, d in zip(before, routed, ready, ended, strict=True) for span in ((a, b), (c, d))]
    if ends > ended[-1]:
        computing.append((float(ended[-1]), ends))
    during = log[(log[:, Transfer.END] > begins) & (log[:, Transfer.BEGIN] < ends)]
    prefetched = during[:, Transfer.PREFETCH] == 1
    return Timeline(
        token=token,
        begins=begins,
        ends=ends,
        computing=computing,
        stalls=[(a, b) for a, b in zip(routed, ready, strict=True) if b > a],
        demand_transfers=[(row[Transfer.BEGIN], row[Transfer.END]) for row in during[~prefetched]],
        prefetch_transfers=[(row[Transfer.BEGIN], row[Transfer.END]) for row in during[prefetched]],
    )
