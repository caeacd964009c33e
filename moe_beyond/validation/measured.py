"""The measurements of a recording: hits, bytes and seconds of every forward, whoever recorded them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.usage_profile import UsageProfile

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LINK, EXPERTS, LAYERS, CACHE, PREDICTOR, FIXED = (
    "link", "experts", "layers", "cache upkeep", "predictor", "fixed cost",
)  # fmt: skip
"""Parts of a token's time: the wait for experts; their computing; layers without their experts; the upkeep of cache and
predictor; and everything else, such as dense layers and head."""
TRANSFERS, COMPUTING = "transfers", "computing"
"""Parts of a foreign engine's token: everything but computing; and computing."""


@dataclass(frozen=True)
class Measured:
    """A recording as its replay is compared with it; S steps (forwards), L layers.

    Attributes:
        name: Folder of the recording, for tables and messages.
        geometry: Geometry of the model.
        settings: Policy, budget and steps of the recording, for its replay; without a device.
        profile: Usage profile of the policy; None without one.
        sequences: Routing of the recorded sequences, with scores if the strategy reads them.
        counts: Hits, late hits and misses of every event, ``(S, L, 3)`` int64.
        transfers: Number of experts that each step transferred, ``(S,)`` int64.
        read_bytes: Bytes that each step transferred, ``(S,)`` float64, in the size of experts in slots.
        generated: Whether a step is a generated token whose time is known, ``(S,)`` bool.
        seconds: Time of each step, ``(S,)`` float64; NaN if it is unknown.
        parts: Part of the time -> seconds of each step, ``(S,)`` float64; their sum is ``seconds``.
        link: Time in which experts crossed the interconnect; None if it was not measured apart from other parts.
    """

    name: str
    geometry: Geometry
    settings: ReplaySettings
    profile: UsageProfile | None
    sequences: tuple[ReplaySequence, ...]
    counts: Ints
    transfers: Ints
    read_bytes: Floats
    generated: Bools
    seconds: Floats
    parts: Mapping[str, Floats]
    link: "LinkTimes | None"

    @property
    def tokens(self) -> Ints:
        """Steps of the generated tokens, in order, ``(n,)`` int64."""
        return np.flatnonzero(self.generated)


@dataclass(frozen=True)
class LinkTimes:
    """Times of the interconnect; S steps.

    Attributes:
        demanded: Number of transfers on demand of each step, ``(S,)`` int64.
        demanded_bytes: Their bytes, ``(S,)`` float64.
        demanded_seconds: Time in which they crossed, ``(S,)`` float64.
        prefetched: Number of prefetches of each step, ``(S,)`` int64.
        prefetched_bytes: Their bytes, ``(S,)`` float64.
        prefetched_seconds: Time in which they crossed, ``(S,)`` float64.
    """

    demanded: Ints
    demanded_bytes: Floats
    demanded_seconds: Floats
    prefetched: Ints
    prefetched_bytes: Floats
    prefetched_seconds: Floats


def expert_bytes(geometry: Geometry, bits: float) -> Floats:
    """Return the bytes of one expert of each layer, ``(L,)`` float64."""
    return np.array(geometry.expert_units) * float(geometry.unit_bytes(bits))
