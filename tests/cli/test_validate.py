"""``moe-beyond validate``: a recorded run from start to end, and refusals."""

import json
from pathlib import Path

import pytest
from _helpers.common import error_line

from moe_beyond.cli.main import main

RUN = ("run", "--model", "small-moe", "--budget", "25%", "--prompt", "import os", "--max-new-tokens", "24", "--quiet")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "recorded"
    assert main([*RUN, "--policy", "lfu", "--trace", str(folder)]) == 0
    return folder


def test_a_run_and_its_replay(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device, file = tmp_path / "box.json", tmp_path / "v.json"
    assert main(["validate", str(recorded), "--fit-device", str(device), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert f"as run: {len(content['events'])} of {len(content['events'])} events equal" in out
    assert "tokens/s:" in out
    assert (content["policy"], content["budget_slots"]) == ("lfu", 48)
    for name in ("hits", "late_hits", "misses", "bytes"):
        assert content["totals"][name]["recorded"] == content["totals"][name]["replayed"], name
    assert all(event["recorded"] == event["replayed"] for event in content["events"])
    times = content["times"]
    assert times["tokens"] == 12
    assert sum(pair["recorded"] for pair in times["parts_ms"].values()) == pytest.approx(times["token_ms"]["recorded"])
    assert sum(pair["replayed"] for pair in times["parts_ms"].values()) == pytest.approx(times["token_ms"]["replayed"])
    assert main(["validate", str(recorded), "--device", str(device), "--quiet", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["times"]["token_ms"] == times["token_ms"]
    replay = ["replay", "--traces", str(recorded), "--budget", "25%", "--device", str(device), "--quiet"]
    assert main([*replay, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["results"][0]["device"] == "fitted on recorded"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "10%"), "is a run, which names its own"),
        (("--device", "rtx4090", "--fit-device", "x.json"), "leave one of them out"),
        (("--device", "lacking.json"), "has no link_latency_us"),
        (("--fit-device", "."), "is a folder"),
    ],
)
def test_refusals(
    recorded: Path, words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("lacking.json").write_text('{"link_gb_per_s": 1, "memory_gb": 1, "memory_gb_per_s": 1}')
    assert said in error_line(capsys, ["validate", recorded, *words])


def test_a_missing_recording(capsys: pytest.CaptureFixture[str]) -> None:
    assert "recording" in error_line(capsys, ["validate"]).lower()
    assert "nowhere" in error_line(capsys, ["validate", "nowhere"])


def test_options_of_a_checkpoint_are_those_of_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--ckpt_path", "x", "--help"]) == 0
    assert "--data.val_split" in capsys.readouterr().out
