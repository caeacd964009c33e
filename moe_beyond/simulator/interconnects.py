"""A device's link as a sequence finds it."""

from moe_beyond.cache.interconnect import LinkState, first_hosted, new_link
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.devices import flash_seconds, host_slots, transfer_seconds
from moe_beyond.simulator.settings import ReplaySettings


def idle_link(settings: ReplaySettings, geometry: Geometry, log_size: int = 0) -> LinkState:
    """Return a link before the first transfer, with as many experts in host memory as fit, or none if that is cold.

    Args:
        settings: With the device; without one transfers take no time.
        geometry: The model.
        log_size: Transfers to keep a record of.
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
