"""Fitting a device to the measurements of a recording."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.simulator.computing import step_timing
from moe_beyond.simulator.devices import RESERVED_SHARE, Device
from moe_beyond.validation.forecast import forecast
from moe_beyond.validation.least_squares import robust, robust_mean
from moe_beyond.validation.measured import (
    CACHE,
    COMPUTING,
    EXPERTS,
    FIXED,
    LAYERS,
    LINK,
    PREDICTOR,
    TRANSFERS,
    Ints,
    LinkTimes,
    Measured,
)

HALVINGS = 6
"""Number of replays that find the overlap."""
ROUNDING = 1e-9
"""Difference of two stalls that is rounding, in seconds."""
LEAST_TOKENS = 8
"""Least number of generated tokens: four to fit on, four to judge."""


@dataclass(frozen=True)
class Fit:
    """A device that was fitted to a recording.

    Attributes:
        device: Device with the fitted fields.
        upkeep: Part of a layer's fixed cost -> seconds per layer; empty for a foreign engine.
        tokens: Number of generated tokens that it was fitted on.
    """

    device: Device
    upkeep: Mapping[str, float]
    tokens: int


def fit_device(measured: Measured, tokens: Ints) -> Fit:
    """Fit a device to some tokens of a recording.

    The interconnect is a non-negative least-squares solution without outliers, with one row per token. Bandwidth and
    cost per transfer differ in effect only where layers differ in bytes; otherwise the bandwidth has all of it. Other
    numbers are robust means (`moe_beyond.validation.least_squares`). The overlap gives the clock the recorded stall.
    A foreign engine has only a rate, a fixed cost and the computing per token.

    Args:
        measured: Measurements of a recording.
        tokens: Steps to fit on, ``(n,)`` int64.

    Raises:
        UserError: There are too few tokens, or none of them transferred an expert.
    """
    return (_fit_engine if measured.link is None else _fit_run)(measured, tokens)


def halves(measured: Measured) -> tuple[Ints, Ints]:
    """Return the first half of the generated tokens, to fit on, and the second half, to judge.

    Args:
        measured: Measurements of a recording.

    Raises:
        UserError: There are too few tokens.
    """
    tokens = measured.tokens
    if len(tokens) < LEAST_TOKENS:
        raise UserError(
            f"{measured.name}: a fit needs {LEAST_TOKENS} generated tokens with times (got {len(tokens)}); record a "
            "longer text"
        )
    return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]


def _fit_run(measured: Measured, tokens: Ints) -> Fit:
    """Fit a device to a run whose transfers and layers were timed."""
    link = measured.link
    assert link is not None
    geometry, layers = measured.geometry, measured.geometry.num_layers
    per_byte, per_transfer = robust(
        np.stack([link.demanded_bytes[tokens], link.demanded[tokens]], axis=1), link.demanded_seconds[tokens]
    )
    part = {name: robust_mean(seconds[tokens]) for name, seconds in measured.parts.items()}
    experts = robust_mean(measured.parts[EXPERTS][tokens] / measured.counts[tokens].sum((1, 2)))
    upkeep = {name: part[name] / layers for name in (CACHE, PREDICTOR)}
    read = float(geometry.mean_expert_bytes(measured.settings.bits)) / max(experts, np.finfo(float).tiny)
    device = _device(measured, len(tokens), per_byte, per_transfer, read)
    device = replace(
        device,
        expert_ms=1e3 * experts,
        layer_us=1e6 * sum(upkeep.values()),
        prefetch_us=1e6 * _prefetch_seconds(link, tokens, per_byte, per_transfer),
    )
    device = _fixed(device, measured, tokens, part[LAYERS] / layers, part[FIXED])
    return Fit(replace(device, overlap=_overlap(measured, device, tokens)), upkeep, len(tokens))


def _prefetch_seconds(link: LinkTimes, tokens: Ints, per_byte: float, per_transfer: float) -> float:
    """Return the seconds that a prefetch takes in addition to a transfer on demand; 0 without prefetches."""
    number = int(link.prefetched[tokens].sum())
    on_demand = per_byte * link.prefetched_bytes[tokens] + per_transfer * link.prefetched[tokens]
    return max(float((link.prefetched_seconds[tokens] - on_demand).sum()) / number, 0.0) if number else 0.0


def _overlap(measured: Measured, device: Device, tokens: Ints) -> float:
    """Return the overlap with which the clock has the recorded stall; the more overlap, the less stall.

    Args:
        measured: Measurements of a run.
        device: Device with all other numbers.
        tokens: Steps of the fit, ``(n,)`` int64.
    """

    def excess(overlap: float) -> float:
        found = forecast(measured, replace(device, overlap=overlap), {})
        return robust_mean(found.parts[LINK][tokens] - measured.parts[LINK][tokens])

    if excess(1.0) >= -ROUNDING:
        return 1.0
    least, most = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if excess(middle) > 0 else (least, middle)
    return least


def _fit_engine(measured: Measured, tokens: Ints) -> Fit:
    """Fit a rate, a fixed cost and the computing per token to an engine that wrote times per token."""
    geometry, bits = measured.geometry, measured.settings.bits
    ones = np.ones(len(tokens))
    per_byte, fixed = robust(np.stack([measured.read_bytes[tokens], ones], axis=1), measured.parts[TRANSFERS][tokens])
    computing = robust_mean(measured.parts[COMPUTING][tokens])
    read = geometry.mean_other_bytes(bits) + geometry.top_k * geometry.mean_expert_bytes(bits)
    device = _device(measured, len(tokens), per_byte, 0.0, geometry.num_layers * float(read) / computing)
    device = replace(device, expert_ms=0.0)
    return Fit(_fixed(device, measured, tokens, computing / geometry.num_layers, fixed), {}, len(tokens))


def _device(measured: Measured, tokens: int, per_byte: float, per_transfer: float, memory_rate: float) -> Device:
    """Return a device with the fitted interconnect.

    Args:
        measured: Measurements of a recording.
        tokens: Number of tokens of the fit.
        per_byte: Seconds per byte of a transfer.
        per_transfer: Seconds per transfer.
        memory_rate: Bytes per second that computing read.

    Raises:
        UserError: No bandwidth was found.
    """
    if per_byte <= 0:
        raise UserError(
            f"{measured.name}: its tokens give no bandwidth of the interconnect (got {measured.transfers.sum():,} "
            "transfers); record a run with a smaller budget"
        )
    geometry, settings = measured.geometry, measured.settings
    held = settings.slots * geometry.mean_expert_bytes(settings.bits)
    held += geometry.num_layers * geometry.mean_other_bytes(settings.bits)
    folder = Path(measured.name).name
    return Device(
        name=f"fitted on {folder}",
        link_gb_per_s=float(1e-9 / per_byte),
        link_latency_us=float(1e6 * per_transfer),
        memory_gb=float(held / (1 - RESERVED_SHARE)) * 1e-9 * 1.001,
        memory_gb_per_s=1e-9 * memory_rate,
        source=f"fitted on {tokens} generated tokens of {folder}; memory_gb: the least that holds the budget",
    )


def _fixed(device: Device, measured: Measured, tokens: Ints, layer: float, token: float) -> Device:
    """Return a device with the fixed costs, less the clock's own reads of head, dense layers and KV cache.

    Args:
        device: Device without fixed costs.
        measured: Measurements of a recording.
        tokens: Steps of the fit, ``(n,)`` int64.
        layer: Seconds of a layer without its experts.
        token: Seconds per token outside the layers.
    """
    context = np.concatenate([sequence.as_group(measured.settings).context for sequence in measured.sequences])[tokens]
    bare = replace(device, other_ms=0.0, layer_us=0.0, token_ms=0.0)
    clock = step_timing(bare, measured.geometry, measured.settings.bits, np.ones_like(context), context)
    return replace(
        device,
        other_ms=1e3 * max(layer - float(np.mean(clock.layer)), 0.0),
        token_ms=1e3 * max(float(token) - float(np.mean(clock.outside)), 0.0),
    )
