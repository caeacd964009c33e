"""``moe-beyond devices``: the presets, one's own, and one line for what is no device."""

import json

import pytest
from _helpers.common import error_line

from moe_beyond.cli.main import main
from moe_beyond.simulator.devices import DEVICES


def listed(capsys, *words):
    assert main(["devices", *words, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_all_presets_are_listed_with_their_sources(capsys):
    assert main(["devices"]) == 0
    out = capsys.readouterr().out
    assert "DeepSeek-V2-Lite at 16 bits" in out
    assert all(out.count(f"│ {name} ") == 2 for name in DEVICES)
    assert "rtechsl.com" in out


def test_json_holds_the_fields_and_what_they_mean_for_the_model(capsys, tmp_path):
    found = listed(capsys)
    assert (found["model"], found["quantization_bits"]) == ("DeepSeek-V2-Lite", 16)
    rows = {row["name"]: row for row in found["devices"]}
    assert list(rows) == list(DEVICES)
    row = rows["rtx4060-laptop-16gb"]
    assert DEVICES["rtx4060-laptop-16gb"].to_json().items() <= row.items()
    # An expert is 8,650,752 parameters of 2 bytes: 17.301504 MB, at 12 GB/s; from flash at 6.
    assert row["transfer_ms"] == pytest.approx(0.02 + 17.301504 / 12)
    assert row["flash_ms"] == pytest.approx(0.1 + 17.301504 / 6)
    assert row["host_slots"] == 693  # of 12 GB
    assert rows["rtx3060"]["flash_ms"] == 0
    assert rows["rtx3060"]["host_slots"] == 1664
    assert main(["devices", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_a_token_with_all_experts_resident(capsys, tmp_path):
    geometry = {
        "model": "g",
        "moe_layers": [0, 1],
        "num_experts": 4,
        "top_k": 2,
        "params_per_expert": 1_000_000,
        "other_params_per_layer": 3_000_000,
        "outside_params": 10_000_000,
    }
    (tmp_path / "g.json").write_text(json.dumps(geometry))
    words = ("--model", str(tmp_path / "g.json"), "--quantization", "4", "--device", "rtx3060,memory_gb_per_s=100")
    found = listed(capsys, *words)
    assert (found["model"], found["quantization_bits"]) == ("g", 4)
    [row] = found["devices"]
    # Two layers of 3 + 2 * 1 million parameters and 10 million outside, half a byte each, at 80 % of 100 GB/s: 125 us;
    # and 55 us for each of two layers.
    assert row["resident_tokens_per_second"] == pytest.approx(1e6 / 235)
    assert row["transfer_ms"] == pytest.approx(0.02 + 0.5 / 25)


def test_devices_of_ones_own(capsys, tmp_path):
    (tmp_path / "mine.json").write_text('{"base": "m4-max", "link_gb_per_s": 5}')
    words = ("--device", "rtx3060,expert_ms=0.5,other_ms=1", "--device", str(tmp_path / "mine.json"))
    changed, mine = listed(capsys, *words)["devices"]
    assert changed["name"] == "rtx3060,expert_ms=0.5,other_ms=1"
    # Dense layer and head: 291 million parameters of 2 bytes at 80 % of 360 GB/s.
    outside = 290_717_696 * 2 / 288e6
    assert changed["resident_tokens_per_second"] == pytest.approx(1000 / (26 * (1 + 0.055 + 6 * 0.5) + outside))
    assert (mine["name"], mine["link_gb_per_s"]) == ("mine", 5)
    (tmp_path / "odd.json").write_text('{"base": "m4-max", "name": "[red]x", "source": "[/y]"}')
    assert main(["devices", "--device", str(tmp_path / "odd.json")]) == 0
    out = capsys.readouterr().out
    assert "[red]x" in out
    assert "[/y]" in out


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("rtx4060laptop", "unknown device 'rtx4060laptop'; did you mean 'rtx4060-laptop'?"),
        ("", "unknown device ''; known: jetson-agx-orin, "),
        ("rtx3060,link_gbps=3", "unknown device field 'link_gbps'; did you mean 'link_gb_per_s'?"),
        ("rtx3060,link_gb_per_s", "'link_gb_per_s' cannot be parsed; write FIELD=VALUE"),
        ("rtx3060,", "'' cannot be parsed; write FIELD=VALUE"),
        ("rtx3060,link_gb_per_s=fast", "link_gb_per_s must be a number (got 'fast')"),
        ("rtx3060,link_gb_per_s=", "link_gb_per_s must be a number (got '')"),
        ("rtx3060,link_gb_per_s=0", "link_gb_per_s must be a finite number above 0 (got 0.0)"),
        ("rtx3060,link_gb_per_s=nan", "link_gb_per_s must be a finite number above 0 (got nan)"),
        ("rtx3060,memory_gb=1,memory_gb=2", "memory_gb is given twice"),
        ("rtx3060,flash_gb_per_s=3", "flash_gb_per_s is given without host_memory_gb; give both or none"),
        ("rtx3060,name=", "name is empty"),
    ],
)
def test_words_that_are_no_device(device, says, capsys):
    assert says in error_line(capsys, ["devices", "--device", device])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"base": "rtx9999x"}', "unknown device 'rtx9999x'"),
        ('{"base": ["rtx3060"]}', "base must be the name of a device (got a list of 1)"),
        ('{"base": "rtx3060", "memory": 3}', "unknown device field 'memory'; did you mean 'memory_gb'?"),
        ('{"link_gb_per_s": 3, "memory_gb": 8}', "has no link_latency_us, memory_gb_per_s"),
        ('{"base": "rtx3060", "link_gb_per_s": "25"}', "link_gb_per_s must be a finite number above 0 (got '25')"),
        ('{"base": "rtx3060", "link_gb_per_s": 1e999}', "(got inf)"),
        ('{"base": "rtx3060", "name": null}', "name must be text (got None)"),
    ],
)
def test_files_that_are_no_device(text, says, tmp_path, capsys):
    path = tmp_path / "d.json"
    if text is not None:
        path.write_text(text)
    said = error_line(capsys, ["devices", "--device", path])
    assert said.startswith(f"{path}: ")
    assert says in said


@pytest.mark.parametrize("bits", ["0", "-4", "nan", "inf", "four"])
def test_bits_that_are_none(bits, capsys):
    assert "quantization" in error_line(capsys, ["devices", "--quantization", bits])


def test_a_model_that_is_unknown(capsys):
    assert "did you mean 'mixtral-8x7b'?" in error_line(capsys, ["devices", "--model", "mixtral"])
