"""A cache stepped event by event from Python, with the functions that the replay steps."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.policy_inputs import PolicyInputs, Stream
from moe_beyond.cache.pools import pool_slots
from moe_beyond.cache.prefetchers import scored
from moe_beyond.cache.prefetchers.settings import EVERYTHING, SCORED, Plan
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.usage_profile import UsageProfile


class Cache:
    """A cold cache that a program steps itself, as a runtime does beside its model.

    Time is the program's own: whatever is demanded or prefetched counts as there.

    Args:
        geometry: The model.
        slots: All slots.
        policy: Name of the eviction policy.
        scope: ``"global"`` or ``"per-layer"``.
        quotas: Slots of each layer for ``"per-layer"``.
        profile: What is known of training text, for policies that need it.
        future: For policies that know it: ``(T, L, K)`` experts of the whole sequence.

    Raises:
        UserError: The policy is unknown, or the slots do not do.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: int,
        policy: str = "lru",
        scope: str = "global",
        quotas: Sequence[int] | None = None,
        profile: UsageProfile | None = None,
        future: npt.NDArray[np.integer] | None = None,
    ) -> None:
        self._geometry = geometry
        pools = pool_slots(geometry, slots, scope, quotas)
        module = load_policy(policy)
        self._verbs = module.VERBS
        self.state = core.empty_cache(geometry.num_layers, geometry.num_experts, pools)
        stream = None if future is None else Stream.of_tokens(geometry, future)
        self._policy = module.state(PolicyInputs(geometry, pools, stream, profile))

    def start_token(self, *, counted: bool = True) -> None:
        """Begin a token, or several that are computed together: nothing computes yet."""
        core.start_step(self.state, counted)

    def know(self, scores: npt.NDArray[np.floating]) -> None:
        """Take in ``(L, E)`` scores of each layer's next run as `Stepper.scores` gives them, NaN where none are known.

        What a token's start or a computed layer tells is told here; what a routed layer tells, with `demand`.

        Raises:
            UserError: They have another shape, or are no probabilities.
        """
        if scores.shape != self._geometry.shape()[:2]:
            raise UserError(f"scores have shape {scores.shape}, expected {self._geometry.shape()[:2]}")
        for layer in np.flatnonzero(~np.isnan(scores[:, 0])):
            if not (np.isfinite(scores[layer]).all() and scores[layer].min() >= 0 and scores[layer].max() <= 1):
                raise UserError(f"scores of layer {layer} are not all finite and within 0..1")
            first = layer * self._geometry.num_experts
            self.state.known[first : first + self._geometry.num_experts] = scores[layer]
            self._verbs.learned(self._policy, self.state, int(layer))

    def demand(self, layer: int, experts: npt.ArrayLike, scores: npt.NDArray[np.floating] | None = None) -> list[int]:
        """Step an event: ``experts`` of ``layer``, an id a token and expert, are needed now, and compute.

        Args:
            layer: The layer that was routed.
            experts: To these.
            scores: What that tells, as `know` takes it: it is learned before anything leaves to make room.

        Returns:
            Those of them, ascending, that have to be moved in.

        Raises:
            UserError: They are more than the slots they may have.
        """
        named, tokens = np.unique(np.asarray(experts, np.int64), return_counts=True)
        ids = self._ids(layer, named)
        room = self.state.pools[layer if len(self.state.pools) > 1 else 0, core.CAPACITY]
        if len(ids) > room and not self._verbs.stages:
            raise UserError(f"layer {layer} demands {len(ids)} experts at once, more than the {room} slots it may have")
        missing = named[self.state.experts[core.PLACE, ids] < 0]
        ready = core.demand(self.state, self._policy, self._verbs, layer, ids, tokens)
        if scores is not None:
            self.know(scores)
        core.fetch(self.state, self._policy, self._verbs, ids, ready)
        return [int(expert) for expert in missing]

    def computed(self, layer: int, experts: npt.ArrayLike) -> None:
        """End an event: its experts may be evicted, and what found no room while they computed comes in."""
        core.release(self.state, self._ids(layer, np.unique(np.asarray(experts, np.int64))))
        core.advance(self.state, self._policy, self._verbs, 0.0)

    def prefetch(self, layer: int, experts: npt.ArrayLike) -> list[int]:
        """Ask for ``experts`` of ``layer``, best first.

        Returns:
            Those that have to be moved in now, in the order asked for; others wait for room until `computed`.
        """
        ids = self._ids(layer, np.asarray(experts, np.int64))
        before = self.state.experts[core.PLACE, ids] >= 0
        core.ask(self.state, self._policy, self._verbs, ids)
        moved = ids[~before & (self.state.experts[core.PLACE, ids] >= 0)]
        return [int(expert) - layer * self._geometry.num_experts for expert in moved]

    def best(self, layer: int, count: int, threshold: float = EVERYTHING) -> list[int]:
        """Return the best-scored experts of a layer that `know` told of, best first."""
        plan = Plan(SCORED, count, threshold, 1, True, self._geometry.top_k)
        end = scored.names(self.state, plan, layer, 0)
        named = self.state.room[core.NAMED, :end] - layer * self._geometry.num_experts
        return [int(expert) for expert in named]

    def finish(self) -> None:
        """End the sequence: what was prefetched and never demanded is wasted."""
        core.finish(self.state)

    def is_resident(self, layer: int, expert: int) -> bool:
        """Tell whether an expert holds a slot."""
        return bool(self.state.experts[core.PLACE, layer * self._geometry.num_experts + expert] >= 0)

    def _ids(self, layer: int, experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return layer * self._geometry.num_experts + experts
