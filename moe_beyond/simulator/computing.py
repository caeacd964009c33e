"""Seconds of computing on a device: MoE layers, dense layers and head, and the KV cache."""

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.steps import Timing
from moe_beyond.errors import UserError
from moe_beyond.geometry import OPTIONAL, Geometry
from moe_beyond.simulator.devices import Device

KV_BITS = 16
"""Bits of a number in the KV cache."""
Ints = npt.NDArray[np.int64]


def step_timing(device: Device, geometry: Geometry, bits: float, tokens: Ints, context: Ints) -> Timing:
    """Compute the seconds of steps on a device.

    A layer reads the weights that its tokens need once, and the KV cache of the context. It takes longer if its tokens
    need more floating-point operations than the device has in that time. Where layers differ in bytes, all take the
    mean time. FLOPs of attention over the context, of dense layers and of the head are left out, and so are fields that
    the geometry lacks (`left_out`).

    Args:
        device: Device that computes.
        geometry: Geometry of the model.
        bits: Bits per parameter.
        tokens: Number of tokens of each step, ``(S,)`` int64.
        context: Number of tokens whose keys and values each step reads, over all sequences, ``(S,)`` int64.
    """
    weights = _read_seconds(device, float(geometry.mean_other_bytes(bits)))
    expert = _read_seconds(device, float(geometry.mean_expert_bytes(bits)))
    if device.other_ms is not None:
        weights = device.other_ms * 1e-3
    if device.expert_ms is not None:
        expert = device.expert_ms * 1e-3
    cached = _read_seconds(device, (geometry.kv_values_per_token or 0) / geometry.num_layers * KV_BITS / 8)
    layer = np.maximum(weights, tokens * _token_seconds(device, geometry.other_params_per_layer)) + context * cached
    outside = _read_seconds(device, (geometry.outside_params or 0) * bits / 8) + device.token_ms * 1e-3
    return Timing(
        layer=layer + device.layer_us * 1e-6,
        outside=np.full(len(tokens), outside),
        expert=expert,
        token=_token_seconds(device, geometry.params_per_expert),
        overlap=float(device.overlap),
    )


def check_host(device: Device | None, misses: str) -> None:
    """Check that the host of a device can compute experts.

    Args:
        device: Device whose host computes.
        misses: Value of ``--misses``, for the message.

    Raises:
        UserError: There is no device, it has no speed of its host, or it has experts on flash.
    """
    if device is None:
        raise UserError(f"--misses {misses}: needs the times of a device; give --device")
    if device.host_gb_per_s is None:
        raise UserError(
            f"--misses {misses}: needs the speed of the host (device {device.name} has no host_gb_per_s); give "
            f"--device {device.name},host_gb_per_s=GB_PER_S"
        )
    if device.flash_gb_per_s is not None:
        raise UserError(
            f"--misses {misses}: the host computes from its memory (device {device.name} has experts on flash); choose "
            "another device"
        )


def host_seconds(device: Device, geometry: Geometry, bits: float) -> tuple[float, float]:
    """Return the seconds in which the host computes an expert: at least, and for each token if that is more.

    Where layers differ in bytes, all take the mean time.

    Args:
        device: Device whose host computes, as `check_host` requires.
        geometry: Geometry of the model.
        bits: Bits per parameter.
    """
    assert device.host_gb_per_s is not None, "settings have checked the device"
    reads = float(geometry.mean_expert_bytes(bits)) / (device.host_gb_per_s * 1e9)
    return reads, 0.0 if device.host_tflops is None else 2 * geometry.params_per_expert / (device.host_tflops * 1e12)


def resident_seconds(device: Device, geometry: Geometry, bits: float, context: int = 0) -> float:
    """Return the seconds of one token if every expert is resident.

    Args:
        device: Device that computes.
        geometry: Geometry of the model.
        bits: Bits per parameter.
        context: Number of tokens before this one (default: 0).
    """
    timing = step_timing(device, geometry, bits, np.array([1]), np.array([context]))
    layer = timing.layer[0] + geometry.top_k * max(timing.expert, timing.token)
    return float(geometry.num_layers * layer + timing.outside[0])


def left_out(geometry: Geometry) -> list[str]:
    """Return the fields that a geometry lacks, whose times are left out."""
    return [name for name in OPTIONAL if getattr(geometry, name) is None]


def _read_seconds(device: Device, size: float) -> float:
    """Return the seconds in which computing reads a number of bytes."""
    return size / (device.memory_gb_per_s * 1e9 * device.efficiency)


def _token_seconds(device: Device, params: int) -> float:
    """Return the seconds in which parameters are applied to a token, two operations each; 0 without a limit."""
    return 0.0 if device.tflops is None else 2 * params / (device.tflops * 1e12)
