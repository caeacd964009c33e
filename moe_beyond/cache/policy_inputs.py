"""What a policy may be told before the first event."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import expert_ids
from moe_beyond.usage_profile import UsageProfile

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stream:
    """All demands of a sequence, or of several in a row, in their order.

    Attributes:
        ids: ``(n,)`` int64, experts as ``layer * E + expert``.
        offsets: ``(events + 1,)`` int64, where each event's experts begin.
    """

    ids: Ints
    offsets: Ints

    @classmethod
    def of_tokens(cls, geometry: Geometry, experts: npt.NDArray[np.integer]) -> "Stream":
        """List the demands of ``(T, L, K)`` experts, every (token, layer) an event."""
        ids = np.sort(expert_ids(experts, geometry.num_experts), axis=-1)
        there, base = ids < geometry.num_experts, np.arange(geometry.num_layers)[:, None] * geometry.num_experts
        if there.all():  # as in most models, and much sooner
            return cls((ids + base).ravel(), np.arange(ids[..., 0].size + 1) * geometry.top_k)
        return cls((ids + base)[there], np.concatenate([[0], there.sum(-1).cumsum()]))

    def events(self) -> Ints:
        """Return the number, from 1, of the event of each demand: ``(n,)``."""
        return np.repeat(np.arange(1, len(self.offsets)), np.diff(self.offsets))


@dataclass(frozen=True)
class PolicyInputs:
    """What `state` of a policy is given; a policy's ``NEEDS`` names what it cannot do without.

    Attributes:
        geometry: The model.
        capacity: ``(pools,)`` int64, the slots of each pool.
        future: Every demand to come, for policies that know it.
        profile: What is known of training text.
    """

    geometry: Geometry
    capacity: Ints
    future: Stream | None = None
    profile: UsageProfile | None = None

    @property
    def num_ids(self) -> int:
        """Experts of all layers."""
        return self.geometry.total_experts

    def popularity(self) -> Floats:
        """Return the share of training tokens that chose each expert, ``(L*E,)``; an even one without a profile."""
        if self.profile is None:
            return np.full(self.num_ids, self.geometry.top_k / self.geometry.num_experts)
        return np.ascontiguousarray(self.profile.popularity, np.float64).ravel()
