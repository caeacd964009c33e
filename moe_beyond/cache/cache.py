"""A cache stepped event by event from Python, with the functions that the replay steps."""

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.policies import load_policy
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry


def quotas(geometry: Geometry, slots: int, scope: str) -> npt.NDArray[np.int64]:
    """Split slots into pools.

    Args:
        geometry: The model.
        slots: All slots.
        scope: ``"global"``, one pool; or ``"per-layer"``, evenly, the remainder to the first layers.

    Returns:
        ``(1,)`` or ``(L,)`` int64.

    Raises:
        UserError: A pool would not hold one event's demand, or there are more slots than experts.
    """
    if slots > geometry.total_experts:
        raise UserError(f"budget of {slots} slots is more than all {geometry.total_experts} experts")
    layers = geometry.num_layers
    if scope == "global":
        pools = np.array([slots])
    elif scope == "per-layer":
        pools = slots // layers + (np.arange(layers) < slots % layers)
    else:
        raise UserError(f"scope {scope!r} is neither 'global' nor 'per-layer'")
    if pools.min() < geometry.top_k:
        need = geometry.top_k * (layers if scope == "per-layer" else 1)
        raise UserError(
            f"budget of {slots} slots is below one event's demand of {geometry.top_k} experts"
            f"{' in each layer' if scope == 'per-layer' else ''}; give at least {need} slots"
        )
    return pools


class Cache:
    """A cold cache.

    Args:
        geometry: The model.
        slots: All slots.
        policy: Name of the eviction policy.
        scope: ``"global"`` or ``"per-layer"``.
        future: For policies that know it: ``(T, L, K)`` experts of the whole sequence, event by event.

    Raises:
        UserError: The policy is unknown, or the slots do not do.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: int,
        policy: str = "lru",
        scope: str = "global",
        future: npt.NDArray[np.integer] | None = None,
    ) -> None:
        self._experts = geometry.num_experts
        pools = quotas(geometry, slots, scope)
        module = load_policy(policy)
        self._verbs = module.VERBS
        self.state = core.empty_cache(geometry.num_layers, geometry.num_experts, pools)
        known = None if future is None else demands(future, geometry)
        self._policy = module.state(geometry.total_experts, len(pools), known)
        self._now = 0

    def demand(self, layer: int, experts: npt.ArrayLike, *, counted: bool = True) -> int:
        """Step an event: ``experts`` of ``layer`` are needed now.

        Returns:
            How many were resident.

        Raises:
            UserError: They are more than the slots they may have.
        """
        ids = layer * self._experts + np.unique(np.asarray(experts, np.int64))
        if len(ids) > (room := self.state.capacity[self.state.pool_of[layer * self._experts]]):
            raise UserError(f"layer {layer} demands {len(ids)} experts at once, more than the {room} slots it may have")
        self._now += 1
        return int(core.demand(self.state, self._policy, self._verbs, ids, self._now, counted))

    def prefetch(self, layer: int, experts: npt.ArrayLike, *, counted: bool = True) -> int:
        """Ask for ``experts`` of ``layer``, best first.

        Returns:
            How many had to cross the link.
        """
        ids = layer * self._experts + np.asarray(experts, np.int64)
        return int(core.prefetch(self.state, self._policy, self._verbs, ids, self._now, counted))

    def start_token(self) -> None:
        """Begin a token: nothing computes, so a prefetch may evict anything."""
        core.start_token(self.state)

    def finish(self) -> None:
        """End the sequence: what was prefetched and never demanded is wasted."""
        core.finish(self.state)

    def is_resident(self, layer: int, expert: int) -> bool:
        """Tell whether an expert holds a slot."""
        return bool(self.state.place[layer * self._experts + expert] >= 0)


def demands(
    experts: npt.NDArray[np.integer], geometry: Geometry
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """List every demand of a sequence ``(T, L, K)`` in order: the experts, and the numbers of their events from 1."""
    length, layers, top_k = experts.shape
    ids = experts.astype(np.int64) + np.arange(layers)[:, None] * geometry.num_experts
    return ids.ravel(), np.repeat(np.arange(1, length * layers + 1), top_k)
