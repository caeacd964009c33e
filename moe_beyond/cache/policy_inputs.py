"""Inputs of a policy before the first event."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import expert_ids
from moe_beyond.usage_profile import UsageProfile

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stream:
    """Demand of all events of one or more sequences, in their order.

    Attributes:
        ids: Experts as ``layer * E + expert``, ``(n,)`` int64.
        offsets: Index of each event's first expert, ``(events + 1,)`` int64.
    """

    ids: Ints
    offsets: Ints

    @classmethod
    def of_tokens(cls, geometry: Geometry, experts: npt.NDArray[np.integer]) -> "Stream":
        """Return the demand of ``(T, L, K)`` expert ids in which every (token, layer) pair is an event."""
        ids = np.sort(expert_ids(experts, geometry.num_experts), axis=-1)
        present, base = ids < geometry.num_experts, np.arange(geometry.num_layers)[:, None] * geometry.num_experts
        if present.all():  # as in most models, and much faster
            return cls((ids + base).ravel(), np.arange(ids[..., 0].size + 1) * geometry.top_k)
        return cls((ids + base)[present], np.concatenate([[0], present.sum(-1).cumsum()]))

    def events(self) -> Ints:
        """Return the event number of each demanded expert, from 1, ``(n,)`` int64."""
        return np.repeat(np.arange(1, len(self.offsets)), np.diff(self.offsets))

    @cached_property
    def events_by_expert(self) -> tuple[Ints, Ints]:
        """Index of the demand by expert, for all policies that read this stream.

        Returns:
            Event number of each demanded expert, expert by expert, ascending, ``(n,)`` int64; and the number of demands
            of each expert up to the highest one, int64.
        """
        small = np.min_scalar_type(int(self.ids.max(initial=0)))  # numpy sorts 16 bits in linear time
        return self.events()[np.argsort(self.ids.astype(small), kind="stable")], np.bincount(self.ids)


@dataclass(frozen=True)
class PolicyInputs:
    """Arguments of a policy's ``init``; the policy's ``NEEDS`` names those that must not be None.

    Attributes:
        geometry: Geometry of the model.
        capacity: Units of each pool, ``(pools,)`` int64; a unit is a slot if all experts have the same size.
        future: Demand of all events, for policies that read it (default: None).
        profile: Usage profile of training text (default: None).
    """

    geometry: Geometry
    capacity: Ints
    future: Stream | None = None
    profile: UsageProfile | None = None

    @property
    def num_ids(self) -> int:
        """Number of experts in all layers, L * E."""
        return self.geometry.total_experts

    def popularity(self) -> Floats:
        """Return the share of training tokens that use each expert, ``(L*E,)``; K / E for all without a profile."""
        if self.profile is None:
            return np.full(self.num_ids, self.geometry.top_k / self.geometry.num_experts)
        return np.ascontiguousarray(self.profile.popularity, np.float64).ravel()
