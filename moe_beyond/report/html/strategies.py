"""What a page replays: the predictor and its references, over budgets, without time and on devices."""

from collections.abc import Sequence
from dataclasses import replace

from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import Device

SHARES = (5, 10, 15, 20, 30, 40, 50, 60)
"""Budgets in percent, where none are asked for."""
DEVICES = ("rtx4060-laptop", "rtx4090", "jetson-agx-orin")
"""Devices, where none are asked for: a laptop's GPU, a desktop's, and unified memory before flash."""


def default_slots(geometry: Geometry) -> list[int]:
    """Return the slots of `SHARES`, but no fewer than one event demands."""
    return sorted({max(geometry.top_k, geometry.total_experts * share // 100) for share in SHARES})


def page_strategies(
    common: ReplaySettings,
    slots: Sequence[int],
    source: ScoreSource,
    geometry: Geometry,
    devices: Sequence[Device] = (),
) -> list[ReplaySettings]:
    """List what to replay: belief and LRU with the predictor, and the references; then the same on every device.

    On devices belief is replayed without prefetch too, so that the worth of prefetching is not that of the policy.

    Args:
        common: What all share.
        slots: Budgets.
        source: Of the scores. They are asked by the first lookahead that says what to fetch; where there is none, they
            only tell what to keep.
        geometry: The model.
        devices: For times.

    Raises:
        UserError: Two devices have one name.
    """
    names = [device.name for device in devices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--device: two are called {twice!r}; give one of them another name (,name=...)")
    ahead = next((lookahead for lookahead in source.lookaheads if lookahead != "next"), None)
    policies = ("belief", "lru") if ahead is not None else ("belief",)
    prefetch = f"top{geometry.top_k}" if ahead is not None else "none"
    found = []
    for device in (None, *devices):
        shared = replace(common, device=device)
        asked = grid(shared, slots, policies, (prefetch,), source, () if ahead is None else (ahead,))
        if device is not None and ahead is not None:
            asked += grid(shared, slots, ("belief",), ("none",), source, (ahead,))
        lines = with_baselines(asked, shared, geometry)
        # The best fixed choice needs no second look: a device changes its times alone.
        found += lines if device is None else [line for line in lines if line.policy != "static_hindsight"]
    return found


def at_headline(results: Sequence[Result]) -> list[Result]:
    """Return the results at one budget: the smallest that holds one token's experts, or else the largest."""
    budgets = {result.budget_slots: result.demand_ratio for result in results if result.policy != "all_resident"}
    enough = [slots for slots, ratio in budgets.items() if ratio >= 1]
    chosen = min(enough) if enough else max(budgets)
    return [result for result in results if result.budget_slots == chosen and result.policy != "all_resident"]
