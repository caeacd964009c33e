"""Seconds of computing, worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from moe_beyond.cache.steps import Timing
from moe_beyond.geometry import PRESETS, Geometry
from moe_beyond.simulator.computing import left_out, resident_seconds, step_timing
from moe_beyond.simulator.devices import DEVICES, Device

# At 8 bits an expert is 2 MB and the other weights of a layer 10 MB: 20 and 100 us at 100 GB/s.
GEOMETRY = Geometry("g", (0, 1, 2), 8, 2, params_per_expert=2_000_000, other_params_per_layer=10_000_000)
DEVICE = Device("d", link_gb_per_s=4, link_latency_us=20, memory_gb=8, memory_gb_per_s=100)


def timing(device: Device = DEVICE, geometry: Geometry = GEOMETRY, bits: float = 8, tokens: int = 1, context: int = 0):
    return step_timing(device, geometry, bits, np.array([tokens]), np.array([context]))


def microseconds(found: Timing) -> tuple[float, ...]:
    return tuple(1e6 * float(part) for part in (found.layer[0], found.outside[0], found.expert, found.token))


@pytest.mark.parametrize(
    ("device", "geometry", "expected"),
    [
        ({}, {}, (100, 0, 20, 0)),
        ({"efficiency": 0.8}, {}, (125, 0, 25, 0)),
        ({"layer_us": 55, "token_ms": 0.3}, {}, (155, 300, 20, 0)),
        ({"efficiency": 0.5}, {"outside_params": 30_000_000}, (200, 600, 40, 0)),
        # Context 1,000: 6,000 numbers a token, 2,000 of them in each layer, of 2 bytes: 4 MB.
        ({}, {"kv_values_per_token": 6_000}, (140, 0, 20, 0)),
        # 2 operations for each of 10 million parameters, at 0.2e12 a second: as long as reading. An expert: 20 us.
        ({"tflops": 0.2}, {}, (100, 0, 20, 20)),
        ({"tflops": 0.1}, {}, (200, 0, 20, 40)),
        # Measured times replace reading; efficiency does not apply to them, but to the KV cache.
        (
            {"other_ms": 0.25, "expert_ms": 0.5, "efficiency": 0.5, "layer_us": 10},
            {"kv_values_per_token": 6_000},
            (250 + 80 + 10, 0, 500, 0),
        ),
    ],
)
def test_a_step_of_one_token(device: dict, geometry: dict, expected: tuple):
    found = timing(replace(DEVICE, **device), replace(GEOMETRY, **geometry), context=1000)
    assert microseconds(found) == pytest.approx(expected)


def test_bits_are_of_weights_and_not_of_the_cache():
    geometry = replace(GEOMETRY, kv_values_per_token=6_000, outside_params=20_000_000)
    assert microseconds(timing(bits=4, geometry=geometry, context=1000)) == pytest.approx((50 + 40, 100, 10, 0))


@pytest.mark.parametrize(("tokens", "layer"), [(1, 100), (4, 100), (5, 100), (10, 200), (512, 10_240)])
def test_a_chunk_reads_its_weights_or_computes_its_tokens(tokens: int, layer: float):
    assert microseconds(timing(replace(DEVICE, tflops=1), tokens=tokens))[0] == pytest.approx(layer)


def test_a_token_with_all_experts_resident():
    assert resident_seconds(DEVICE, GEOMETRY, 8) == pytest.approx(3 * (100e-6 + 2 * 20e-6))
    device = replace(DEVICE, efficiency=0.5, layer_us=10, token_ms=1)
    geometry = replace(GEOMETRY, outside_params=1_000_000, kv_values_per_token=3_000)
    layer = 200e-6 + 10e-6 + 2 * 40e-6 + 100 * 1_000 * 2 / 50e9
    assert resident_seconds(device, geometry, 8, context=100) == pytest.approx(3 * layer + 1e-3 + 20e-6)


def test_deepseek_on_a_laptop():
    # MoE layers: 26 x (31.2 + 6 x 8.65 MB) = 2.161 GB; dense layer and head: 0.291 GB; at 80 % of 256 GB/s 11.97 ms.
    # Fixed cost: 26 x 55 us = 1.43 ms. Together 13.4 ms; at 4,096 tokens 15,552 numbers of 2 bytes each: 0.62 ms.
    geometry, device = PRESETS["deepseek-v2-lite"].geometry, DEVICES["rtx4060-laptop"]
    assert resident_seconds(device, geometry, 8) * 1e3 == pytest.approx(13.40, abs=0.01)
    assert resident_seconds(device, geometry, 8, 4096) * 1e3 == pytest.approx(13.40 + 0.62, abs=0.01)


def test_unknown_fields_of_a_geometry_are_named():
    assert left_out(GEOMETRY) == ["outside_params", "kv_values_per_token"]
    assert left_out(replace(GEOMETRY, outside_params=0)) == ["kv_values_per_token"]
    assert left_out(PRESETS["olmoe-1b-7b"].geometry) == []
