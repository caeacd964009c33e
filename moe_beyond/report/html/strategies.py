"""The replays of a page: the predictor and the baselines over budgets, without a device and on devices."""

from collections.abc import Sequence
from dataclasses import replace

from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import Device

DEFAULT_SHARES = (5, 10, 15, 20, 30, 40, 50, 60)
"""Default budgets, in percent of all experts."""
DEFAULT_DEVICES = ("rtx4060-laptop", "rtx4090", "jetson-agx-orin")
"""Default devices: a laptop GPU, a desktop GPU, and unified memory with flash."""


def default_slots(geometry: Geometry) -> list[int]:
    """Return the slots of `DEFAULT_SHARES`; at least the experts of one event."""
    return sorted({max(geometry.top_k, geometry.total_experts * share // 100) for share in DEFAULT_SHARES})


def page_strategies(
    common: ReplaySettings,
    slots: Sequence[int],
    source: ScoreSource,
    geometry: Geometry,
    devices: Sequence[Device] = (),
) -> list[ReplaySettings]:
    """List the replays: belief and LRU with the predictor, and the baselines; then the same on every device.

    On devices, belief is also replayed without prefetching, which separates the gain of prefetching from the policy's.

    Args:
        common: Settings that all replays share.
        slots: Budgets, in slots.
        source: Source of the scores. Prefetches use its first lookahead other than ``"next"``; without one, scores only
            decide which experts to keep.
        geometry: Geometry of the model.
        devices: Devices of the timing model.

    Raises:
        UserError: Two devices have the same name.
    """
    names = [device.name for device in devices]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--device: two devices have the same name (got {duplicate!r}); rename one with ,name=NAME")
    lookahead = next((lookahead for lookahead in source.lookaheads if lookahead != "next"), None)
    policies = ("belief", "lru") if lookahead is not None else ("belief",)
    prefetch = f"top{geometry.top_k}" if lookahead is not None else "none"
    strategies = []
    for device in (None, *devices):
        shared = replace(common, device=device)
        own = grid(shared, slots, policies, (prefetch,), source, () if lookahead is None else (lookahead,))
        if device is not None and lookahead is not None:
            own += grid(shared, slots, ("belief",), ("none",), source, (lookahead,))
        compared = with_baselines(own, shared, geometry)
        # On a device the best static choice has the same hits and bytes: it is not replayed again.
        strategies += (
            compared if device is None else [settings for settings in compared if settings.policy != "static_hindsight"]
        )
    return strategies


def at_summary_budget(results: Sequence[Result]) -> list[Result]:
    """Return the results at the summary's budget: the smallest with a demand ratio of at least 1, or the largest."""
    demand_ratios = {result.budget_slots: result.demand_ratio for result in results if result.policy != "all_resident"}
    sufficient = [slots for slots, ratio in demand_ratios.items() if ratio >= 1]
    budget = min(sufficient) if sufficient else max(demand_ratios)
    return [result for result in results if result.budget_slots == budget and result.policy != "all_resident"]
