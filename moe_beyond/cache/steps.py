"""Inputs of the engine, a sequence as arrays and the seconds of its computing; and its record of each event."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.lookahead import Lookahead

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


MANY_LAYERS = 2**32
"""More layers than any lookahead has."""


class Ahead(IntEnum):
    """Numbers of `in_layers` for lookaheads that wait for more than routing.

    ``ROUTER_INPUT`` is lookahead 0, whose scores become available just before their own layer's event.
    """

    ROUTER_INPUT = -1
    COMPUTED = 0


class StepArrays(NamedTuple):
    """A sequence as arrays, step by step.

    Attributes:
        ids: Experts that every event demands, ``(n,)`` int64, as ``layer * E + expert``, ascending within an event.
        offsets: Index of each event's first expert, ``(S * L + 1,)`` int64.
        tokens: Number of tokens of the step that demand each expert, ``(n,)`` int64.
        scores: Probabilities, ``(S, H, L, E)`` float32, NaN if there are none; H may be 0.
        lookaheads: Lookahead of each slice of the scores as `in_layers` numbers it, ``(H,)`` int64, ascending.
        counted: Whether each step counts or belongs to the warm-up, ``(S,)`` bool.
    """

    ids: Ints
    offsets: Ints
    tokens: Ints
    scores: npt.NDArray[np.float32]
    lookaheads: Ints
    counted: npt.NDArray[np.bool_]


def in_layers(lookaheads: Sequence[Lookahead], num_layers: int) -> Ints:
    """Return the number of layers that have not computed yet when the scores of each lookahead become available.

    It is h for lookahead h, L for ``"token"``, and L + 1 for ``"next"``; for the others it is a member of `Ahead`.

    Args:
        lookaheads: The H lookaheads.
        num_layers: Number of layers L.

    Returns:
        ``(H,)`` int64, ascending if the lookaheads are in their order.
    """
    names = {0: Ahead.ROUTER_INPUT, "computed": Ahead.COMPUTED, "token": num_layers, "next": num_layers + 1}
    return np.array([names[h] if h in names else min(int(h), num_layers) for h in lookaheads], np.int64)


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
