"""Interconnect of a device at the start of a sequence."""

from moe_beyond.cache.interconnect import LinkState, first_hosted, new_link
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.devices import flash_seconds, host_slots, transfer_seconds
from moe_beyond.simulator.settings import ReplaySettings


def idle_link(settings: ReplaySettings, geometry: Geometry, log_size: int = 0) -> LinkState:
    """Return an interconnect before the first transfer; host memory is full, or empty if it starts cold.

    Args:
        settings: Settings of the replay; without a device transfers take no time.
        geometry: Geometry of the model.
        log_size: Number of transfers to log (default: 0).
    """
    device, bits = settings.device, settings.bits
    if device is None:
        return new_link(geometry.total_experts, log_size=log_size)
    expert_bytes, hosted = geometry.params_per_expert * bits / 8, host_slots(device, geometry, bits)
    return new_link(
        geometry.total_experts,
        transfer_seconds(device, expert_bytes),
        flash_seconds(device, expert_bytes),
        hosted,
        log_size,
        () if settings.cold_host else first_hosted(geometry.num_layers, geometry.num_experts, hosted),
    )
