"""Division of slots into pools, and the choice of experts that fill them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry


def pool_slots(
    geometry: Geometry, slots: int, scope: str, quotas: Sequence[int] | None = None
) -> npt.NDArray[np.int64]:
    """Divide slots into pools.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots in total.
        scope: ``"global"`` for one pool, or ``"per-layer"``.
        quotas: Slots of each layer (default: an even split with the remainder in the first layers).

    Returns:
        Slots of each pool, ``(1,)`` or ``(L,)`` int64.

    Raises:
        UserError: A pool is smaller than one event's demand, or there are more slots than experts.
    """
    if slots > geometry.total_experts:
        raise UserError(f"budget of {slots} slots is more than all {geometry.total_experts} experts; give fewer slots")
    layers = geometry.num_layers
    if scope == "global":
        pools = np.array([slots])
    elif scope == "per-layer":
        pools = slots // layers + (np.arange(layers) < slots % layers)
    else:
        raise UserError(f"scope must be 'global' or 'per-layer' (got {scope!r})")
    if quotas is not None:
        pools = np.array(quotas, np.int64)
        if len(pools) != layers or pools.sum() != slots:
            raise UserError(
                f"quotas must be {layers} numbers that sum to {slots} slots "
                f"(got {len(pools)} numbers that sum to {pools.sum()})"
            )
        if pools.max() > geometry.num_experts:
            raise UserError(f"quotas: {pools.max()} slots are more than a layer's {geometry.num_experts} experts")
    if pools.min() < geometry.top_k:
        minimum = geometry.top_k * (layers if scope == "per-layer" else 1)
        raise UserError(
            f"budget of {slots} slots is below one event's demand of {geometry.top_k} experts"
            f"{' in each layer' if scope == 'per-layer' else ''}; give at least {minimum} slots"
        )
    return pools


def proportional_quotas(geometry: Geometry, slots: int, popularity: npt.NDArray[np.float64]) -> tuple[int, ...]:
    """Divide slots among layers in proportion to the number of experts that each layer spreads its demand over.

    That number is the perplexity of the layer's popularity, exp(entropy). It is E if all experts are used equally, and
    K if the same K experts are always used.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots in total.
        popularity: Share of tokens that use each expert, ``(L, E)`` float64.

    Returns:
        L numbers from K to E that sum to ``slots``; the largest fractions are rounded up.

    Raises:
        UserError: There are more slots than experts.
    """
    share = popularity / popularity.sum(1, keepdims=True)
    spread = np.exp(-(share * np.log(np.where(share > 0, share, 1.0))).sum(1))
    quotas = np.full(geometry.num_layers, geometry.top_k)
    while quotas.sum() < slots:
        growing = quotas < geometry.num_experts
        if not growing.any():
            raise UserError(
                f"budget of {slots} slots is more than all {geometry.total_experts} experts; give fewer slots"
            )
        target = spread / spread[growing].sum() * (slots - quotas[~growing].sum())
        quotas[np.argmax(np.where(growing, target - quotas, -np.inf))] += 1
    return tuple(int(quota) for quota in quotas)


def most_used(uses: npt.NDArray[np.number], pools: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Choose the most used experts that fill every pool.

    Args:
        uses: Number or share of uses of each expert, ``(L*E,)``.
        pools: Slots of each pool as `pool_slots` returns them, ``(1,)`` or ``(L,)``.

    Returns:
        Experts, ``(slots,)`` int64, the most used first; ties by the lower (layer, expert).
    """
    size = len(uses) // len(pools)
    chosen = [
        pool * size + np.argsort(-uses[pool * size : (pool + 1) * size], kind="stable")[:slots]
        for pool, slots in enumerate(pools)
    ]
    ids = np.sort(np.concatenate(chosen))
    return ids[np.argsort(-uses[ids], kind="stable")]
