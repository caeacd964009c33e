"""``moe-beyond plan``."""

import json
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import tiny_traces
from _helpers.scoring import history_folder, scores_folder

from moe_beyond import pretrained as published
from moe_beyond.cli.main import main
from moe_beyond.traces.reader import TraceSet


@pytest.fixture
def _house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    traces = tiny_traces(tmp_path / "traces", sequences=8)
    scores_folder(tmp_path / "scores", traces, (1,))
    history_folder(tmp_path / "history", traces)
    fields = {"link_gb_per_s": 0.003, "link_latency_us": 0, "memory_gb": 1, "memory_gb_per_s": 0.02}
    (tmp_path / "mine.json").write_text(json.dumps(fields))


def plan(*words: str) -> None:
    assert main(["plan", "--traces", "traces", *words]) == 0


def replayed(capsys: pytest.CaptureFixture[str], slots: int, *words: str) -> dict:
    capsys.readouterr()
    assert main(["replay", "--traces", "traces", "--budget", str(slots), "--json", "-", *words]) == 0
    return json.loads(capsys.readouterr().out)["results"][0]


@pytest.mark.usefixtures("_house")
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--scope", "per-layer"),
        ("--scope", "per-layer", "--quotas", "proportional", "--profile", "history"),
        ("--warm-start", "--profile", "history"),
    ],
)
def test_the_smallest_budget_is_the_replays(capsys, more):
    plan("--target", "55%", "--json", "plan.json", *more)
    found = json.loads(Path("plan.json").read_text())
    assert (found["target"], found["unavailable"]) == ("55%", [])
    answer = found["answers"][0]
    slots = answer["budget_slots"]
    assert (answer["strategy"], answer["bottleneck"], answer["budget_bytes"]) == ("lru", None, 2000 * slots)
    assert answer["result"] == replayed(capsys, slots, *more)
    assert answer["result"]["hit_rate"] >= 0.55 > replayed(capsys, slots - 1, *more)["hit_rate"]
    cold = [one["strategy"] for one in found["answers"]]
    assert cold == (["lru", "lru", "belady"] if "--warm-start" in more else ["lru", "belady"])
    assert found["answers"][-1]["budget_slots"] <= found["answers"][-2]["budget_slots"]


@pytest.mark.usefixtures("_house")
def test_tokens_a_second_on_a_device(capsys):
    words = ("--device", "mine.json", "--scores", "scores", "--policy", "belief", "--prefetch", "p>0.5")
    plan("--target", "150tok/s", *words, "--json", "-")
    found = json.loads(capsys.readouterr().out)
    assert [one["strategy"] for one in found["answers"]] == ["belief + p>0.5", "lru", "belady", "clairvoyant prefetch"]
    for answer in found["answers"]:
        assert answer["result"]["tokens_per_second"] >= 150
    assert found["answers"][0]["result"] == replayed(capsys, found["answers"][0]["budget_slots"], *words)
    plan("--target", "400tok/s", *words)
    said = capsys.readouterr().out
    assert "smallest budget for 400tok/s on mine" in said
    assert "at best" in said
    assert "tok/s with all experts resident" in " ".join(said.replace("│", " ").split())


@pytest.mark.usefixtures("_house")
def test_a_plan_keeps_to_the_devices_memory(capsys):
    # An eighth of 80 kB is kept and 40 kB are other weights: room for 15 experts of 2 kB.
    plan("--target", "100tok/s", "--device", "mine.json,memory_gb=8e-5", "--json", "plan.json")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(at most 15 slots)" in said
    assert "tok/s is a forecast without dense layers and head and the KV cache" in said
    for answer in json.loads(Path("plan.json").read_text())["answers"]:
        assert answer["result"]["budget_slots"] <= answer["result"]["device_slots"] == 15


@pytest.mark.slow  # compiles their policies
@pytest.mark.usefixtures("_house")
def test_systems_and_what_they_lack(capsys):
    plan("--target", "50%", "--strategy", "all", "--json", "-", "--device", "mine.json")
    found = json.loads(capsys.readouterr().out)
    assert [one["strategy"] for one in found["answers"]] == [
        "moe-spac", "llama.cpp", "lru", "belady", "lru, window 8", "clairvoyant prefetch",
    ]  # fmt: skip
    missing = {one["strategy"]: one["reason"] for one in found["unavailable"]}
    without_predictor = {"belief-cross-layer", "moe-beyond", "moe-infinity", "specmd", "hybrimoe"}
    assert set(missing) == without_predictor | {"od-moe", "llama.cpp-cpu", "fiddler"}
    assert missing["od-moe"] == "it keeps no cache, so it has no budget"


@pytest.mark.usefixtures("_house")
def test_pins(capsys):
    plan("--pins", "pins.json", "--budget", "50%")
    assert "pins: pins.json" in capsys.readouterr().out
    counted = json.loads(Path("pins.json").read_text())
    assert (counted["model"], counted["budget_slots"], counted["counted_on"]) == ("tiny", 16, "tests")
    assert (counted["num_experts"], counted["expert_bytes"]) == (8, None)
    assert list(counted["layers"]) == ["1", "2", "3", "4"]
    assert sum(map(len, counted["layers"].values())) == 16
    uses = np.zeros((4, 8), np.int64)
    for trace in TraceSet("traces").traces():
        np.add.at(uses, (np.arange(4)[None, :, None], trace.experts), 1)
    pinned = sum(uses[layer - 1, experts].sum() for layer in range(1, 5) for experts in [counted["layers"][str(layer)]])
    assert pinned == replayed(capsys, 16, "--policy", "static_hindsight")["hits"]
    assert counted["uses_share"] == pinned / uses.sum()
    plan("--pins", "per.json", "--budget", "9", "--scope", "per-layer", "--quotas", "2,3,2,2", "--json", "-")
    layers = json.loads(Path("per.json").read_text())["layers"]
    assert [len(experts) for experts in layers.values()] == [2, 3, 2, 2]
    plan("--pins", "profiled.json", "--budget", "50%", "--profile", "history", "--target", "50%")
    profiled = json.loads(Path("profiled.json").read_text())
    assert profiled["counted_on"] == "history"
    assert profiled["layers"] != counted["layers"]  # it was counted on the train split only
    plan("--pins", "train.json", "--budget", "50%", "--split", "train")
    assert json.loads(Path("train.json").read_text())["layers"] == profiled["layers"]


@pytest.mark.usefixtures("_house")
def test_pins_are_of_the_traces_whatever_named_systems_know(monkeypatch, tmp_path):
    history_folder(tmp_path / "package/checkpoints/history.tiny", TraceSet("traces"), model_id="tiny")
    monkeypatch.setattr(published, "__file__", str(tmp_path / "package/pretrained.py"))
    plan("--pins", "alone.json", "--budget", "50%")
    plan("--pins", "beside.json", "--budget", "50%", "--strategy", "llama.cpp", "--target", "50%")
    assert Path("beside.json").read_text() == Path("alone.json").read_text()
