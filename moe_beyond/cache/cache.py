"""A cache stepped event by event from Python, with the functions that the replay steps."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.inputs import PolicyInputs, Stream
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.prefetchers import scored
from moe_beyond.cache.prefetchers.plan import EVERYTHING, SCORED, Plan
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.profile import Profile


def pool_slots(
    geometry: Geometry, slots: int, scope: str, quotas: Sequence[int] | None = None
) -> npt.NDArray[np.int64]:
    """Split slots into pools.

    Args:
        geometry: The model.
        slots: All slots.
        scope: ``"global"``, one pool; or ``"per-layer"``.
        quotas: Slots of each layer; where None they are split evenly, the remainder to the first layers.

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
    if quotas is not None:
        pools = np.array(quotas, np.int64)
        if len(pools) != layers or pools.sum() != slots:
            raise UserError(f"quotas are {len(pools)} numbers that sum to {pools.sum()}, not {layers} to {slots} slots")
        if pools.max() > geometry.num_experts:
            raise UserError(f"quotas: {pools.max()} slots are more than a layer's {geometry.num_experts} experts")
    if pools.min() < geometry.top_k:
        need = geometry.top_k * (layers if scope == "per-layer" else 1)
        raise UserError(
            f"budget of {slots} slots is below one event's demand of {geometry.top_k} experts"
            f"{' in each layer' if scope == 'per-layer' else ''}; give at least {need} slots"
        )
    return pools


def proportional_quotas(geometry: Geometry, slots: int, popularity: npt.NDArray[np.float64]) -> tuple[int, ...]:
    """Split slots among layers in proportion to how many experts each spreads its demand over.

    That number is the perplexity of the layer's popularity, exp(entropy): E where all are used alike, K where always
    the same K are.

    Args:
        geometry: The model.
        slots: All slots.
        popularity: ``(L, E)``.

    Returns:
        L numbers from K to E that sum to ``slots``; what is left of the fractions goes to the largest of them.
    """
    share = popularity / popularity.sum(1, keepdims=True)
    spread = np.exp(-(share * np.log(np.where(share > 0, share, 1.0))).sum(1))
    quotas = np.full(geometry.num_layers, geometry.top_k)
    while (left := slots - quotas.sum()) > 0:
        open_ = quotas < geometry.num_experts
        if not open_.any():
            raise UserError(f"budget of {slots} slots is more than all {geometry.total_experts} experts")
        wanted = spread / spread[open_].sum() * (slots - quotas[~open_].sum())
        quotas[np.argmax(np.where(open_, wanted - quotas, -np.inf))] += 1 if left else 0
    return tuple(int(quota) for quota in quotas)


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
        profile: Profile | None = None,
        future: npt.NDArray[np.integer] | None = None,
    ) -> None:
        self._geometry = geometry
        pools = pool_slots(geometry, slots, scope, quotas)
        module = load_policy(policy)
        self._verbs = module.VERBS
        self.state = core.empty_cache(geometry.num_layers, geometry.num_experts, pools)
        stream = None if future is None else _stream(geometry, future)
        self._policy = module.state(PolicyInputs(geometry, pools, stream, profile))

    def start_token(self, *, counted: bool = True) -> None:
        """Begin a token, or several that are computed together: nothing computes yet."""
        core.start_step(self.state, counted)

    def know(self, scores: npt.NDArray[np.floating]) -> None:
        """Take in ``(L, E)`` scores of the coming layers as `Stepper.scores` gives them, NaN where none are known."""
        if scores.shape != (self._geometry.num_layers, self._geometry.num_experts):
            raise UserError(f"scores have shape {scores.shape}, expected {self._geometry.shape()[:2]}")
        for layer in np.flatnonzero(~np.isnan(scores[:, 0])):
            first = layer * self._geometry.num_experts
            self.state.known[first : first + self._geometry.num_experts] = scores[layer]
            self._verbs.learned(self._policy, self.state, int(layer))

    def demand(self, layer: int, experts: npt.ArrayLike) -> list[int]:
        """Step an event: ``experts`` of ``layer``, an id a token and expert, are needed now, and compute.

        Returns:
            Those of them, ascending, that have to be moved in.

        Raises:
            UserError: They are more than the slots they may have.
        """
        named, tokens = np.unique(np.asarray(experts, np.int64), return_counts=True)
        ids = self._ids(layer, named)
        room = self.state.pools[self.state.experts[core.POOL, ids[0]], core.CAPACITY]
        if len(ids) > room and not self._verbs.stages:
            raise UserError(f"layer {layer} demands {len(ids)} experts at once, more than the {room} slots it may have")
        missing = named[self.state.experts[core.PLACE, ids] < 0]
        core.demand(self.state, self._policy, self._verbs, ids)
        size = self._geometry.num_experts
        self.state.known[layer * size : (layer + 1) * size] = np.nan
        self._verbs.routed(self._policy, self.state, ids, tokens)
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


def _stream(geometry: Geometry, experts: npt.NDArray[np.integer]) -> Stream:
    length, layers, top_k = experts.shape
    ids = np.sort(experts.astype(np.int64) + np.arange(layers)[:, None] * geometry.num_experts, axis=-1)
    return Stream(ids.ravel(), np.arange(length * layers + 1) * top_k)
