"""What a prefetcher is told, and how it is written in options."""

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError

# Kinds of prefetchers.
NONE, SCORED, ADAPTIVE, MOE_INFINITY, ORACLE = range(5)
KINDS = {"none": NONE, "adaptive": ADAPTIVE, "moe_infinity": MOE_INFINITY, "oracle": ORACLE}
EVERYTHING = -1.0  # a threshold below every score
HOW = "write none, top6, p>0.5, top6,p>0.1, adaptive, adaptive,p>0.1, moe_infinity or oracle"


_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)"
_WRITTEN = re.compile(
    rf"(?P<kind>none|oracle|moe_infinity)|(?P<adaptive>adaptive)(?:,p>(?P<t>{_NUMBER}))?"
    rf"|(?:top(?P<m>[1-9]\d*)(?:,p>(?P<t1>{_NUMBER}))?|p>(?P<t2>{_NUMBER}))(?:@(?P<d>[1-9]\d*))?",
    re.ASCII,
)


class Plan(NamedTuple):
    """A prefetcher's settings.

    Attributes:
        kind: Which.
        most: Experts of a layer that it names at most (moe_infinity: of all layers).
        threshold: Only those of a higher score.
        distance: Layers between asking and needing; 0 asks right before the event.
        first_layers: Whether layers whose scores exist when the step starts are asked for then (at distance 0: layer 0
            right before its event).
        top_k: Experts that a token needs in a layer.
    """

    kind: int
    most: int
    threshold: float
    distance: int
    first_layers: bool
    top_k: int


class Outlook(NamedTuple):
    """What lies ahead.

    Attributes:
        need: ``(L,)`` float64, when each layer of this step will be routed if nothing stalls more, on the link's clock.
        ids: ``(n,)`` int64, all demands, for the oracle alone.
        offsets: ``(events + 1,)`` int64, where each event's begin.
        event: ``(1,)``, which of them is next, from 0.
    """

    need: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    event: npt.NDArray[np.int64]


class Prefetch(NamedTuple):
    """A prefetcher as options write it: its kind, how many it names at most, above which score, and how far ahead.

    ``most`` and ``distance`` are None where they are not said.
    """

    kind: int
    most: int | None
    threshold: float
    distance: int | None


def parse_prefetch(text: str) -> Prefetch:
    """Read a prefetcher.

    Args:
        text: ``none``, ``oracle``, ``moe_infinity``, ``adaptive`` or ``adaptive,p>0.1``; ``top6``, ``p>0.5`` or
            ``top6,p>0.1``, the best-scored of a layer; those also with a distance, ``top6@2``.

    Raises:
        UserError: It cannot be read, or its threshold is not within 0..1.
    """
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise UserError(f"prefetch {text!r} cannot be read; {HOW}")
    found = match.groupdict()
    written = found["t"] or found["t1"] or found["t2"]
    threshold = EVERYTHING if written is None else float(written)
    if written is not None and not 0 <= threshold <= 1:
        raise UserError(f"prefetch {text!r}: the threshold is a probability, 0 to 1")
    return Prefetch(
        KINDS.get(found["kind"] or found["adaptive"], SCORED),
        None if found["m"] is None else int(found["m"]),
        threshold,
        None if found["d"] is None else int(found["d"]),
    )
