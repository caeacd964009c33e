"""``moe-beyond probe``: the file that it writes, its table, and one line for bad input."""

import json
from pathlib import Path

import pytest
from _helpers.common import error_line

from moe_beyond.cli.main import main
from moe_beyond.runtime import probe
from moe_beyond.simulator.devices import load_device, transfer_seconds

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "decoder_sparse_step": 1,
    "vocab_size": 100,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small measurement, and a model."""
    for name, value in {"REPEATS": 3, "MOVED_BYTES": 2**16, "FILE_BYTES": 2**18, "READS": 2, "OPERATIONS": 3}.items():
        monkeypatch.setattr(probe, name, value)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    return model


def test_a_device_file_is_what_was_measured(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "machine.json"
    assert main(["probe", "--model", str(small), "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "computing of an expert for one token" in printed
    assert "read of an expert from the page cache, 4 readers" in printed
    device = load_device(str(out))
    assert device.name == "machine"
    assert device.efficiency == 1
    assert device.expert_ms is not None
    assert device.other_ms is not None
    assert "medians of 3 repeats at experts of 0.0123 MB" in device.source  # 3 x 64 x 32 parameters of 2 bytes
    assert main(["devices", "--device", str(out), "--model", str(small)]) == 0
    assert list(small.iterdir()) == [small / "config.json"]  # the temporary file is gone


def test_times_of_the_device_are_the_medians(small: Path) -> None:
    found = probe.probe("cpu", 50_000)
    device = found.device("d")
    assert transfer_seconds(device, 50_000) == pytest.approx(found.copy.median)
    assert device.memory_gb_per_s == pytest.approx(2**16 / found.memory.median / 1e9)
    assert (device.other_ms, device.expert_ms) == (None, None)
    assert device.layer_us == pytest.approx(22e6 * found.operation.median)
    direct = [row.median for (source, _), row in found.disk.items() if source == "disk"]
    if direct:
        assert device.flash_gb_per_s == pytest.approx(53_248 / min(direct) / 1e9)  # 13 pages


def test_a_disk_without_direct_reads_gives_one_tier(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_beyond.runtime.storage.disk_speed.DIRECT", 0)
    device = probe.probe("cpu", 50_000).device("d")
    assert (device.host_memory_gb, device.flash_gb_per_s) == (None, None)


def test_with_other_bits_computing_is_not_measured(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--model", str(small), "--quantization", "4", "--device", "cpu", "--json", "-"]) == 0
    device = json.loads(capsys.readouterr().out)
    assert device["expert_ms"] is None
    assert "experts of 0.00307 MB" in device["source"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--expert-bytes", "0"), "--expert-bytes 0: must be at least 1"),
        (("--expert-bytes", "9", "--model", "olmoe-1b-7b"), "contradicts --model"),
        (("--expert-bytes", str(10**15)), "GB of memory (got"),
        (("--quantization", "0"), "bits per parameter must be more than 0"),
        (("--model", "absent"), "unknown model preset 'absent'"),
        (("--expert-bytes", "4096", "--folder", "/absent"), "/absent: is no folder"),
        (("--out", "machine.txt"), "a device file ends in .json"),
    ],
)
def test_bad_input_is_one_line(
    small: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert says in error_line(capsys, ["probe", "--device", "cpu", *words])
