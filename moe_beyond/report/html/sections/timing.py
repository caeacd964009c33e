"""The section on replays with a device: tokens per second by the timing model."""

from collections.abc import Sequence

from moe_beyond.geometry import Geometry
from moe_beyond.report.html.page import Chart, Section, Table
from moe_beyond.report.html.sections.replay import (
    DEMAND_RATIO,
    budget_chart,
    budget_phrase,
    format_speed,
    headings,
    rows_by_budget,
)
from moe_beyond.report.html.strategies import at_summary_budget
from moe_beyond.report.html.svg import format_number
from moe_beyond.report.labels import BASELINES, NO_VALUE
from moe_beyond.simulator import Result
from moe_beyond.simulator.devices import Device, device_slots

MINIMUM_GAIN = 0.01
"""Speeds that differ by a smaller share count as equal."""


def timing_section(results: Sequence[Result], devices: Sequence[Device], geometry: Geometry, bits: float) -> Section:
    """Show tokens per second and stalls on each device.

    Args:
        results: Results of all replays.
        devices: Devices of the timing model.
        geometry: Geometry of the model.
        bits: Bits per parameter.
    """
    charts, tables, folded = [], [], []
    for device in devices:
        on_device = [result for result in results if result.device == device.name]
        resident = _resident(on_device)
        charts.append(_speed_chart(on_device, device, geometry, bits))
        tables.append(_times_table([*at_summary_budget(on_device), resident], device))
        folded.append(_times_table(on_device, device, every=True))
    return Section(
        "timing",
        "Estimated speed on devices",
        prose=[
            "The same strategies with a timing model. A prefetch occupies the interconnect, and the layer waits for "
            "late experts, so hit rates are lower than above. A vertical line marks the budget that fills the "
            "device's memory, next to the other weights of the MoE layers and an eighth kept free. The tables mark "
            "larger budgets.",
            *verdicts(results),
        ],
        charts=charts,
        tables=tables,
        folded=folded,
    )


def verdicts(results: Sequence[Result]) -> list[str]:
    """State for each device whether prefetching is faster, at the budget of the summary.

    The fastest strategy that prefetches with the predictor is compared with the fastest strategy without prefetching:
    LRU, or a policy that reads the same scores.
    """
    sentences = []
    for device in dict.fromkeys(result.device for result in results if result.device is not None):
        shown = at_summary_budget([result for result in results if result.device == device])
        prefetching = [result for result in shown if result.predictor is not None and result.prefetch != "none"]
        on_demand = [result for result in shown if result.prefetch == "none" and _is_online(result)]
        if prefetching and any(result.tokens_per_second for result in on_demand):
            sentences.append(_verdict(_fastest(prefetching), _fastest(on_demand)))
    return sentences


def _resident(results: Sequence[Result]) -> Result:
    return next(result for result in results if result.policy == "all_resident")


def _is_online(result: Result) -> bool:
    """Return whether a runtime can use the strategy; most baselines know the future."""
    return result.predictor is not None or result.strategy == "lru"


def _fastest(results: Sequence[Result]) -> Result:
    return max(results, key=lambda result: result.tokens_per_second or 0.0)


def _verdict(prefetching: Result, on_demand: Result) -> str:
    assert prefetching.tokens_per_second is not None
    assert on_demand.tokens_per_second is not None
    gain = prefetching.tokens_per_second / on_demand.tokens_per_second - 1
    name = BASELINES["lru"].name if on_demand.strategy == "lru" else on_demand.strategy
    speeds = (
        f"{prefetching.strategy} reaches {format_speed(prefetching)} tokens/s, {name} without prefetching "
        f"{format_speed(on_demand)}"
    )
    start = f"On {prefetching.device} with {prefetching.budget_slots:,} slots, prefetching"
    if gain >= MINIMUM_GAIN:
        return f"{start} is faster: {speeds} ({gain:+.0%})."
    if gain <= -MINIMUM_GAIN:
        return f"{start} is slower: {speeds} ({gain:+.0%})."
    return f"{start} makes no difference: {speeds} (within {MINIMUM_GAIN:.0%})."


def _speed_chart(results: Sequence[Result], device: Device, geometry: Geometry, bits: float) -> Chart:
    memory_full = (device_slots(device, geometry, bits) / geometry.total_experts, f"{device.memory_gb:g} GB full")
    caption = (
        f"Interconnect {device.link_gb_per_s:g} GB/s, memory {device.memory_gb:g} GB at {device.memory_gb_per_s:g} "
        f"GB/s. With all experts resident: {format_speed(_resident(results))} tokens/s."
    )
    return budget_chart(
        device.name, "tokens/s", results, lambda r: r.tokens_per_second, format_number, caption, [memory_full]
    )


def _times_table(results: Sequence[Result], device: Device, *, every: bool = False) -> Table:
    first = results[0]
    capacity = f" The device has room for {first.device_slots:,} experts." if first.device_slots else ""
    return Table(
        f"{'Table: ' if every else ''}{device.name} {budget_phrase(first, every)}",
        "Bytes: transferred / demanded. Stall and p95: milliseconds per token. Late: requested, but still in transit "
        f"when demanded. all_resident: no budget.{capacity}{f' {DEMAND_RATIO}' if every else ''} "
        f"Source of the device's numbers: {device.source or 'not stated'}.",
        headings(every, "hit rate", "bytes", "tokens/s", "stall, ms", "p95, ms", "late"),
        rows_by_budget(
            results,
            every,
            lambda r: [
                f"{r.hit_rate:.1%}",
                f"{r.bytes_ratio:.2f}",
                format_speed(r),
                *(NO_VALUE if time is None else f"{time:.1f}" for time in (r.stall_ms_per_token, r.token_ms_p95)),
                f"{r.late_hits / max(r.accesses, 1):.1%}",
            ],
        ),
    )
