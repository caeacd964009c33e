"""Division of a budget into pools, and the choice of experts that fill them.

Sizes are in the units of a geometry (`moe_beyond.geometry.Geometry.expert_units`): slots, if all experts have the same
size.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import shown


def budget_units(geometry: Geometry, slots: int, budget_bytes: int | None = None) -> int:
    """Return the units of a budget.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots, each for an expert of mean size.
        budget_bytes: Exact bytes where layers differ (default: None, the bytes of the slots).
    """
    if budget_bytes is None:
        return slots * geometry.total_units // geometry.total_experts
    return min(budget_bytes // int(geometry.unit_bytes(0)), geometry.total_units)


def least_slots(geometry: Geometry, scope: str) -> int:
    """Return the smallest budget that holds the event of one token, in slots.

    Args:
        geometry: Geometry of the model.
        scope: ``"global"`` or ``"per-layer"``.
    """
    if scope == "per-layer":
        return geometry.demand_per_token
    return -(-geometry.top_k * max(geometry.expert_units) * geometry.total_experts // geometry.total_units)


def pool_capacities(
    geometry: Geometry,
    slots: int,
    scope: str,
    quotas: Sequence[int] | None = None,
    budget_bytes: int | None = None,
) -> npt.NDArray[np.int64]:
    """Divide a budget into pools.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots in total.
        scope: ``"global"`` for one pool, or ``"per-layer"``.
        quotas: Slots of each layer (default: an even split with the remainder in the first layers that have room).
        budget_bytes: Exact bytes where layers differ (default: None, the bytes of the slots).

    Returns:
        Units of each pool, ``(1,)`` or ``(L,)`` int64.

    Raises:
        UserError: A pool is smaller than one event's demand, or there are more slots than experts.
    """
    if slots > geometry.total_experts:
        raise UserError(f"budget of {slots} slots is more than all {geometry.total_experts} experts; give fewer slots")
    units = np.array(geometry.expert_units)
    budget = budget_units(geometry, slots, budget_bytes)
    if scope == "global":
        pools, least = np.array([budget]), geometry.top_k * units.max()
    elif scope == "per-layer":
        pools, least = _even_quotas(geometry, budget, units) * units, geometry.top_k * units
    else:
        raise UserError(f"scope must be 'global' or 'per-layer' (got {shown(scope)})")
    if quotas is not None:
        pools = _check_quotas(geometry, slots, budget, np.array(quotas, np.int64)) * units
    if (pools < least).any():
        raise UserError(
            f"budget of {slots} slots is below one event's demand of {geometry.top_k} experts"
            f"{' in each layer' if scope == 'per-layer' else ''}; give at least {least_slots(geometry, scope)} slots"
        )
    return pools


def _even_quotas(geometry: Geometry, budget: int, units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the same number of slots for each layer, and one more for the first layers that have room for it."""
    quotas = np.full(geometry.num_layers, budget // units.sum())
    rest = int(budget % units.sum())
    for layer, size in enumerate(units.tolist()):
        if size <= rest and quotas[layer] < geometry.num_experts:
            quotas[layer] += 1
            rest -= size
    return quotas


def _check_quotas(geometry: Geometry, slots: int, budget: int, quotas: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the slots of each layer, which fit into the budget; if all experts have the same size, they fill it.

    Raises:
        UserError: The number of layers or the sum is wrong.
    """
    if len(quotas) != geometry.num_layers or (geometry.has_one_size and quotas.sum() != slots):
        raise UserError(
            f"quotas must be {geometry.num_layers} numbers that sum to {slots} slots "
            f"(got {len(quotas)} numbers that sum to {quotas.sum()})"
        )
    if quotas.max() > geometry.num_experts:
        raise UserError(f"quotas: {quotas.max()} slots are more than a layer's {geometry.num_experts} experts")
    if (taken := int(quotas @ np.array(geometry.expert_units))) > budget:
        unit = int(geometry.unit_bytes(0))
        raise UserError(f"quotas take {taken * unit:,} bytes of a budget of {budget * unit:,}; give fewer slots")
    return quotas


def proportional_quotas(geometry: Geometry, slots: int, popularity: npt.NDArray[np.float64]) -> tuple[int, ...]:
    """Divide slots among layers in proportion to the number of experts that each layer spreads its demand over.

    That number is the perplexity of the layer's popularity, exp(entropy). It is E if all experts are used equally, and
    K if the same K experts are always used.

    Args:
        geometry: Geometry of the model.
        slots: Number of slots in total.
        popularity: Share of tokens that use each expert, ``(L, E)`` float64.

    Returns:
        L numbers from K to E, whose experts fill the slots; the largest fractions are rounded up.

    Raises:
        UserError: There are more slots than experts.
    """
    share = popularity / popularity.sum(1, keepdims=True)
    spread = np.exp(-(share * np.log(np.where(share > 0, share, 1.0))).sum(1))
    if slots > geometry.total_experts:
        raise UserError(f"budget of {slots} slots is more than all {geometry.total_experts} experts; give fewer slots")
    units, budget = np.array(geometry.expert_units), budget_units(geometry, slots)
    quotas = np.full(geometry.num_layers, geometry.top_k)
    while (growing := (quotas < geometry.num_experts) & (units <= budget - (quotas * units).sum())).any():
        rest = budget - (quotas * units)[~growing].sum()
        target = spread / (spread * units)[growing].sum() * rest
        quotas[np.argmax(np.where(growing, target - quotas, -np.inf))] += 1
    return tuple(int(quota) for quota in quotas)


def most_used(
    uses: npt.NDArray[np.number], pools: npt.NDArray[np.int64], units: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Choose the experts with the most uses per unit that fill every pool.

    Args:
        uses: Number or share of uses of each expert, ``(L*E,)``.
        pools: Units of each pool as `pool_capacities` returns them, ``(1,)`` or ``(L,)``.
        units: Units of an expert of each layer, L numbers.

    Returns:
        Experts, ``(n,)`` int64, the most used per unit first; ties by the lower (layer, expert).
    """
    sizes = np.repeat(units, len(uses) // len(units)).tolist()
    per_pool, room, chosen = len(uses) // len(pools), pools.tolist(), []
    for expert in np.argsort(-(uses / np.array(sizes)), kind="stable").tolist():
        if sizes[expert] <= room[expert // per_pool]:
            chosen.append(expert)
            room[expert // per_pool] -= sizes[expert]
    return np.array(chosen, np.int64)
