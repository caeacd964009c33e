"""One token in time: what computed, what stalled, what crossed the link."""

from dataclasses import dataclass

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.replay import Replay
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.usage_profile import UsageProfile

Spans = list[tuple[float, float]]
"""Begin and end, in seconds on the clock of the replay."""


@dataclass(frozen=True)
class Timeline:
    """The spans of one token.

    Attributes:
        token: Its place in the sequence.
        begins: When it started.
        ends: When its last layer was through.
        computing: Two a layer: until it was routed, and its experts.
        stalls: Waiting for experts.
        demand_transfers: On the link because they were demanded.
        prefetch_transfers: On the link ahead of demand; also what was asked for in this token and arrives after it.
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
    """Replay a sequence from a cold cache, and keep the times of one token.

    Args:
        geometry: The model.
        settings: The strategy; with a device, and every token a step.
        sequence: The sequence.
        token: Which.
        profile: What is known of training text.

    Raises:
        UserError: There is no device, or no such token.
    """
    if settings.device is None:
        raise UserError("a timeline needs a device; give --device")
    if not 0 <= token < len(sequence):
        raise UserError(f"the sequence has {len(sequence)} tokens, and no token {token}")
    replaying = Replay(geometry, settings, profile)
    spans, log = replaying.watch(sequence)
    layers = geometry.num_layers
    routed, ready, through = spans[token * layers : (token + 1) * layers].T
    begins = float(routed[0]) - replaying.timing.other
    before = np.concatenate([[begins], through[:-1]])
    during = log[(log[:, 2] > begins) & (log[:, 1] < through[-1])]
    ahead = during[:, 3] == 1
    return Timeline(
        token=token,
        begins=begins,
        ends=float(through[-1]),
        computing=[
            pair for a, b, c, d in zip(before, routed, ready, through, strict=True) for pair in ((a, b), (c, d))
        ],
        stalls=[(a, b) for a, b in zip(routed, ready, strict=True) if b > a],
        demand_transfers=[(row[1], row[2]) for row in during[~ahead]],
        prefetch_transfers=[(row[1], row[2]) for row in during[ahead]],
    )
