"""Interconnect of a device at the start of a sequence."""

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.interconnect import LinkState, Seconds, first_hosted, new_link
from moe_beyond.cache.misses import MOVE
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.computing import host_seconds
from moe_beyond.simulator.devices import Device, flash_seconds, host_units, transfer_seconds
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
    mean, hosted = float(geometry.mean_expert_bytes(bits)), host_units(device, geometry, bits)
    units = geometry.expert_units
    link = new_link(
        geometry.total_experts,
        transfer_seconds(device, mean),
        flash_seconds(device, mean),
        hosted,
        log_size,
        () if settings.cold_host else first_hosted(geometry.num_experts, units, hosted),
        np.repeat(units, geometry.num_experts),
        1.0 if geometry.has_one_size else _relative(device, geometry, bits),
    )
    link.seconds[Seconds.PREFETCH] = device.prefetch_us * 1e-6
    if settings.misses != MOVE:
        link.seconds[[Seconds.HOST, Seconds.HOST_TOKEN]] = host_seconds(device, geometry, bits)
    return link


def _relative(device: Device, geometry: Geometry, bits: float) -> npt.NDArray[np.float64]:
    """Return the duration of each expert's copy and read divided by that of an expert of mean size, ``(2, L*E)``."""
    sizes = [float(units * geometry.unit_bytes(bits)) for units in geometry.expert_units]
    rows = []
    for seconds in (transfer_seconds, flash_seconds):
        mean = seconds(device, float(geometry.mean_expert_bytes(bits))) or 1.0  # 0: there is no flash
        rows.append(np.repeat([seconds(device, size) / mean for size in sizes], geometry.num_experts))
    return np.stack(rows)
