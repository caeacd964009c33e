"""Splitting slots into pools, and choosing the experts that fill them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry


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
    while quotas.sum() < slots:
        open_ = quotas < geometry.num_experts
        if not open_.any():
            raise UserError(f"budget of {slots} slots is more than all {geometry.total_experts} experts")
        wanted = spread / spread[open_].sum() * (slots - quotas[~open_].sum())
        quotas[np.argmax(np.where(open_, wanted - quotas, -np.inf))] += 1
    return tuple(int(quota) for quota in quotas)


def most_used(uses: npt.NDArray[np.number], pools: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Choose the experts that fill every pool: those used most.

    Args:
        uses: ``(L*E,)``, how often each is used.
        pools: ``(1,)`` or ``(L,)``, slots, as `pool_slots` gives them.

    Returns:
        ``(slots,)`` int64, the most used first; ties by the lower (layer, expert).
    """
    size = len(uses) // len(pools)
    chosen = [
        pool * size + np.argsort(-uses[pool * size : (pool + 1) * size], kind="stable")[:slots]
        for pool, slots in enumerate(pools)
    ]
    ids = np.sort(np.concatenate(chosen))
    return ids[np.argsort(-uses[ids], kind="stable")]
