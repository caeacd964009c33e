"""Inputs of the engine, a sequence as arrays and the seconds of its computing; and its record of each event."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.lookahead import Lookahead

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class StepArrays(NamedTuple):
    """A sequence as arrays, step by step.

    Attributes:
        ids: Experts that every event demands, ``(n,)`` int64, as ``layer * E + expert``, ascending within an event.
        offsets: Index of each event's first expert, ``(S * L + 1,)`` int64.
        tokens: Number of tokens of the step that demand each expert, ``(n,)`` int64.
        scores: Probabilities, ``(S, H, L, E)`` float32, NaN if there are none; H may be 0.
        lookaheads: Lookahead of each slice of the scores, ``(H,)`` int64, ascending; L if it is available at the step's
            start, L + 1 if it is available after the same layer of the step before.
        computed: Whether scores become available after a layer is computed, instead of routed.
        counted: Whether each step counts or belongs to the warm-up, ``(S,)`` bool.
    """

    ids: Ints
    offsets: Ints
    tokens: Ints
    scores: npt.NDArray[np.float32]
    lookaheads: Ints
    computed: bool
    counted: npt.NDArray[np.bool_]


def in_layers(lookaheads: Sequence[Lookahead], num_layers: int) -> Ints:
    """Return lookaheads in layers, ``(H,)`` int64: ``"token"`` is L, and ``"next"`` is L + 1."""
    names = {"token": num_layers, "next": num_layers + 1}
    return np.array([names[h] if isinstance(h, str) else min(h, num_layers) for h in lookaheads], np.int64)


class Timing(NamedTuple):
    """Seconds of computing.

    Attributes:
        layer: Seconds of an MoE layer without its routed experts, in each step, ``(S,)`` float64.
        outside: Seconds of each step outside its MoE layers, after the last of them, ``(S,)`` float64.
        expert: Seconds that one routed expert takes, for any number of tokens.
        token: Seconds that one routed expert takes for each token, if that is more; 0 for no limit.
        overlap: Share of an expert's computing that can begin before all experts of its wave have arrived.
    """

    layer: Floats
    outside: Floats
    expert: float
    token: float
    overlap: float


def no_computing(steps: int) -> Timing:
    """Return a timing in which computing takes no time.

    Args:
        steps: Number of steps S.
    """
    return Timing(np.zeros(steps), np.zeros(steps), 0.0, 0.0, 1.0)


class EventRecord(IntEnum):
    """Columns of the engine's record of events.

    Times are in seconds: the layer was routed, all experts of the event's last wave had arrived, and the event ended.
    ``STALL`` is the time of the event in which nothing computed. The others count its experts.
    """

    ROUTED = 0
    READY = 1
    ENDED = 2
    HITS = 3
    LATE_HITS = 4
    MISSES = 5
    STALL = 6
