"""A cache that a Python program steps event by event, through the functions of the replay."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.core import Expert, Pool, Scratch
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.policy_inputs import PolicyInputs, Stream
from moe_beyond.cache.pools import pool_slots
from moe_beyond.cache.prefetchers import NO_THRESHOLD, PrefetcherId, scored
from moe_beyond.cache.prefetchers._inputs import PrefetchSettings
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.usage_profile import UsageProfile


class Cache:
    """A cold cache that a program steps, as a runtime does next to its model.

    The program keeps the time: a demanded or prefetched expert counts as resident immediately.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots in total.
        policy: Name of the eviction policy (default: ``"lru"``).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        quotas: Slots of each layer for ``"per-layer"`` (default: an even split).
        profile: Usage profile of training text, for policies that need it.
        future: Experts of the whole sequence, ``(T, L, K)``, for policies that need the future.

    Raises:
        UserError: The policy is unknown, or the slots do not fit the model.
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
        implementation = load_policy(policy)
        self._hooks = implementation.HOOKS
        self.state = core.empty_cache(geometry.num_layers, geometry.num_experts, pools)
        stream = None if future is None else Stream.of_tokens(geometry, future)
        self._policy = implementation.init(PolicyInputs(geometry, pools, stream, profile))

    def start_token(self, *, counted: bool = True) -> None:
        """Begin a token, or several tokens that are computed together.

        Args:
            counted: Whether its accesses and transfers are counted (default: True).
        """
        core.start_step(self.state, counted)

    def set_scores(self, scores: npt.NDArray[np.floating]) -> None:
        """Make scores of each layer's next run available.

        Call it with scores that become available at a token's start or after a layer was computed. Scores that become
        available after a layer was routed are an argument of `demand`.

        Args:
            scores: Probabilities as `Stepper.scores` returns them, ``(L, E)`` floating; NaN for layers without scores.

        Raises:
            UserError: The shape is wrong, or a score is not a probability.
        """
        if scores.shape != self._geometry.shape()[:2]:
            raise UserError(f"scores must have shape {self._geometry.shape()[:2]} (got {scores.shape})")
        for layer in np.flatnonzero(~np.isnan(scores[:, 0])):
            if not (np.isfinite(scores[layer]).all() and scores[layer].min() >= 0 and scores[layer].max() <= 1):
                raise UserError(f"scores of layer {layer} must be finite and within 0..1")
            first = layer * self._geometry.num_experts
            self.state.scores[first : first + self._geometry.num_experts] = scores[layer]
            self._hooks.on_scores(self._policy, self.state, int(layer))

    def demand(self, layer: int, experts: npt.ArrayLike, scores: npt.NDArray[np.floating] | None = None) -> list[int]:
        """Begin an event: a layer is routed, and its experts compute.

        Args:
            layer: Layer that was routed.
            experts: Demanded experts, one id per token and top-k entry, any shape.
            scores: Scores that become available with the routing, as in `set_scores`; they are set before any eviction
                (default: none).

        Returns:
            Distinct experts, ascending, that must be transferred.

        Raises:
            UserError: The layer demands more experts than its pool has slots.
        """
        distinct, tokens = np.unique(np.asarray(experts, np.int64), return_counts=True)
        ids = self._ids(layer, distinct)
        capacity = self.state.pools[layer if len(self.state.pools) > 1 else 0, Pool.CAPACITY]
        if len(ids) > capacity and not self._hooks.bypass:
            raise UserError(
                f"layer {layer} demands {len(ids)} experts at once, more than the {capacity} slots of its pool; "
                "give a larger budget"
            )
        missing = distinct[self.state.experts[Expert.PLACE, ids] < 0]
        ready = core.demand(self.state, self._policy, self._hooks, layer, ids, tokens)
        if scores is not None:
            self.set_scores(scores)
        core.transfer_missing(self.state, self._policy, self._hooks, ids, ready)
        return [int(expert) for expert in missing]

    def computed(self, layer: int, experts: npt.ArrayLike) -> None:
        """End an event: its experts may be evicted, and queued prefetches take their slots.

        Args:
            layer: Layer of the event.
            experts: Experts of the event, any shape.
        """
        core.unpin(self.state, self._ids(layer, np.unique(np.asarray(experts, np.int64))))
        core.advance(self.state, self._policy, self._hooks, 0.0)

    def prefetch(self, layer: int, experts: npt.ArrayLike) -> list[int]:
        """Queue experts of a layer for transfer.

        Args:
            layer: Layer of the experts.
            experts: Distinct experts, the most urgent first, ``(m,)``.

        Returns:
            Experts that must be transferred now, in the given order; the others wait for a slot until `computed`.
        """
        ids = self._ids(layer, np.asarray(experts, np.int64))
        before = self.state.experts[Expert.PLACE, ids] >= 0
        core.enqueue_prefetch(self.state, self._policy, self._hooks, ids)
        moved = ids[~before & (self.state.experts[Expert.PLACE, ids] >= 0)]
        return [int(expert) - layer * self._geometry.num_experts for expert in moved]

    def best(self, layer: int, count: int, threshold: float = NO_THRESHOLD) -> list[int]:
        """Return the best-scored experts of a layer, best first; none if the layer has no scores.

        Args:
            layer: Layer of the experts.
            count: Largest number of experts.
            threshold: Score that each expert exceeds (default: no threshold).
        """
        settings = PrefetchSettings(
            PrefetcherId.SCORED.value, count, threshold, 1, True, self._geometry.top_k, False, False, False
        )
        end = scored.best_of_layer(self.state, settings, layer, 0)
        selected = self.state.scratch_int[Scratch.SELECTED, :end] - layer * self._geometry.num_experts
        return [int(expert) for expert in selected]

    def finish(self) -> None:
        """End the sequence: prefetched experts that were never demanded count as wasted."""
        core.finish(self.state)

    def is_resident(self, layer: int, expert: int) -> bool:
        """Return whether an expert has a slot."""
        return bool(self.state.experts[Expert.PLACE, layer * self._geometry.num_experts + expert] >= 0)

    def _ids(self, layer: int, experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return layer * self._geometry.num_experts + experts
