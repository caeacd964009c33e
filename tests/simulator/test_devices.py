"""Device presets, devices read from words and files, and the times that follow from them."""

import json
from dataclasses import replace

import pytest

from moe_beyond.errors import UserError
from moe_beyond.geometry import PRESETS, Geometry
from moe_beyond.simulator.devices import (
    DEVICES,
    Device,
    device_slots,
    flash_seconds,
    host_slots,
    load_device,
    transfer_seconds,
)

# At 8 bits an expert is 2 MB and the other weights of a layer 10 MB.
GEOMETRY = Geometry("g", (0, 1, 2), 8, 2, params_per_expert=2_000_000, other_params_per_layer=10_000_000)
ONE_TIER = Device("one", link_gb_per_s=4, link_latency_us=20, memory_gb=8, memory_gb_per_s=100)
TWO_TIERS = replace(ONE_TIER, name="two", host_memory_gb=0.007, flash_gb_per_s=0.5, flash_latency_us=100.0)


def test_times_by_hand():
    assert transfer_seconds(ONE_TIER, 2e6) == pytest.approx(20e-6 + 500e-6)
    assert flash_seconds(ONE_TIER, 2e6) == 0
    assert flash_seconds(TWO_TIERS, 2e6) == pytest.approx(100e-6 + 4e-3)


@pytest.mark.parametrize(
    ("device", "slots"),
    [
        # (8 GB * 7/8 - 26 layers * 31.2 MB) / 8.65 MB, by hand: 7 - 0.811 = 6.189 GB.
        ("rtx4060-laptop", 715),
        ("rtx4060-laptop,memory_gb=0.9", 0),
        ("rtx4090", 1664),  # 21 - 0.8 GB hold all 14.4
    ],
)
def test_experts_that_a_device_holds(device, slots):
    assert device_slots(load_device(device), PRESETS["deepseek-v2-lite"].geometry, 8) == slots


@pytest.mark.parametrize(
    ("host_memory_gb", "bits", "slots"),
    [
        (0.007, 8, 3),  # 3.5 experts of 2 MB
        (0.006, 8, 3),
        (0.0059, 8, 2),
        (0.007, 4.5, 6),  # of 1.125 MB, 6.2
        (0.001, 8, 0),
        (1, 8, 24),  # no more than there are
    ],
)
def test_experts_that_host_memory_holds(host_memory_gb, bits, slots):
    assert host_slots(replace(TWO_TIERS, host_memory_gb=host_memory_gb), GEOMETRY, bits) == slots


def test_with_one_tier_all_experts_wait_behind_the_link():
    assert host_slots(ONE_TIER, GEOMETRY, 16) == GEOMETRY.total_experts == 24


def test_the_published_load_times():
    # DeepSeek-V2-Lite in bf16 at 25, 12 and 3 GB/s: 0.69, 1.44 and 5.77 ms, and what starting takes.
    expert_bytes = PRESETS["deepseek-v2-lite"].geometry.params_per_expert * 2
    devices = {"rtx3060": 0.69 + 0.02, "rtx4060-laptop": 1.44 + 0.02, "jetson-orin-nx": 5.77 + 0.1}
    for name, milliseconds in devices.items():
        assert transfer_seconds(DEVICES[name], expert_bytes) * 1e3 == pytest.approx(milliseconds, abs=0.005)


def test_every_preset_is_found_by_its_name_and_says_where_it_comes_from():
    for name, device in DEVICES.items():
        assert load_device(name) is not None
        assert load_device(name) == device
        assert device.name == name
        assert "memory" in device.source
    assert any(device.host_memory_gb for device in DEVICES.values())


def test_a_changed_preset_says_so():
    base = DEVICES["rtx4060-laptop"]
    device = load_device("rtx4060-laptop, link_gb_per_s=10,expert_ms=0.4")
    words = "link_gb_per_s=10,expert_ms=0.4"
    assert device == replace(
        base,
        name=f"rtx4060-laptop,{words}",
        link_gb_per_s=10.0,
        expert_ms=0.4,
        source=f"{base.source}; {words} by hand",
    )
    named = load_device("rtx3060,link_gb_per_s=10,name=mine")
    assert named.name == "mine"
    assert named.source.endswith("link_gb_per_s=10 by hand")
    assert load_device("rtx3060,name=mine").source == DEVICES["rtx3060"].source


def test_a_preset_becomes_two_tiers():
    device = load_device("rtx3060,host_memory_gb=28,flash_gb_per_s=3.3,flash_latency_us=100")
    assert (device.host_memory_gb, device.flash_gb_per_s, device.flash_latency_us) == (28, 3.3, 100)


def test_a_file_holds_a_device_or_what_differs_from_a_preset(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(TWO_TIERS.to_json()))
    assert load_device(str(path)) == TWO_TIERS
    assert load_device(f"{path},link_gb_per_s=8").link_gb_per_s == 8
    path.write_text(json.dumps({"base": "rtx4060-laptop-16gb", "host_memory_gb": None, "flash_gb_per_s": None}))
    with pytest.raises(UserError, match="flash_latency_us needs"):
        load_device(str(path))
    given = {"base": "rtx4060-laptop", "other_ms": 0.25}
    path.write_text(json.dumps(given))
    base = DEVICES["rtx4060-laptop"]
    assert load_device(str(path)) == replace(base, name="mine", other_ms=0.25, source=f"{base.source}; from mine.json")
    path.write_text(json.dumps({**given, "name": "n", "source": "s"}))
    assert load_device(str(path)) == replace(base, name="n", other_ms=0.25, source="s")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"link_gb_per_s": 0}, "link_gb_per_s must be a finite number above 0 (got 0)"),
        ({"memory_gb": -1}, "memory_gb must be a finite number above 0 (got -1)"),
        ({"memory_gb_per_s": float("nan")}, "memory_gb_per_s must be a finite number above 0 (got nan)"),
        ({"link_latency_us": -0.5}, "link_latency_us must be a finite number from 0 (got -0.5)"),
        ({"link_gb_per_s": float("inf")}, "(got inf)"),
        ({"link_gb_per_s": 10**400}, "link_gb_per_s must be a finite number"),
        ({"link_gb_per_s": True}, "(got True)"),
        ({"link_gb_per_s": "12"}, "(got '12')"),
        ({"link_gb_per_s": None}, "(got None)"),
        ({"flash_latency_us": None}, "(got None)"),
        ({"efficiency": 0}, "efficiency must be a finite number above 0 (got 0)"),
        ({"efficiency": 1.2}, "efficiency must be above 0 and at most 1 (got 1.2)"),
        ({"layer_us": -1}, "layer_us must be a finite number from 0 (got -1)"),
        ({"tflops": 0}, "tflops must be a finite number above 0 (got 0)"),
        ({"expert_ms": -1}, "expert_ms must be a finite number from 0 (got -1)"),
        ({"host_memory_gb": 16}, "host_memory_gb is given without"),
        ({"flash_gb_per_s": 3}, "flash_gb_per_s is given without"),
        ({"flash_latency_us": 100}, "flash_latency_us needs"),
        ({"prefetch_us": 9, "host_memory_gb": 1, "flash_gb_per_s": 1}, "prefetch_us is not known together with"),
        ({"name": 3}, "name must be text (got 3)"),
        ({"name": ""}, "name is empty"),
        ({"source": None}, "source must be text (got None)"),
    ],
)
def test_numbers_that_no_device_has(change, says):
    with pytest.raises(UserError) as caught:
        replace(ONE_TIER, **change)
    assert says in str(caught.value)


def test_a_transfer_may_start_at_once():
    assert transfer_seconds(replace(ONE_TIER, link_latency_us=0), 4e9) == 1
