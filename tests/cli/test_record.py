"""Figures that go into a predictor's folder, and the list that shows them."""

import json
import shutil
from pathlib import Path

import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.fitting import Run

from moe_beyond import pretrained as published
from moe_beyond.cli.evaluate import _command
from moe_beyond.cli.main import main
from moe_beyond.predictors.io.folder import read_predictor


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.folder / "predictor", tmp_path / "cross_layer.tiny-tests"))


def evaluated(folder: Path, traces: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    asked = ["evaluate", str(folder), "--traces", str(traces), "--budget", "8", *words, "--json", "-"]
    assert main(asked) == 0
    return json.loads(capsys.readouterr().out)


def test_recorded_figures_are_those_of_the_evaluation(folder, tmp_path, capsys):
    traces = tiny_traces(tmp_path / "other", seed=5)
    weights = (folder / "model.safetensors").read_bytes()
    said = evaluated(folder, tmp_path / "other", capsys, "--policy", "belief", "--record")
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    (recorded,) = config["figures"]
    assert recorded["fingerprint"] == traces.manifest.fingerprint
    assert recorded["command"] == "moe-beyond evaluate cross_layer.tiny-tests --traces DIR --budget 8 --policy belief"
    assert [row["recall_at_k"] for row in recorded["metrics"]] == [row["recall_at_k"] for row in said["metrics"]]
    assert [row["hit_rate"] for row in recorded["replay"]] == [row["hit_rate"] for row in said["results"]]
    for row in said["metrics"]:
        assert f"| {row['lookahead']} | {row['recall_at_k']:.1%} |" in card
    for row in said["results"]:
        assert f"| {row['hit_rate']:.1%} | {row['bytes_ratio']:.2f} |" in card
    assert str(tmp_path) not in card + json.dumps(config)
    assert (folder / "model.safetensors").read_bytes() == weights
    read_predictor(folder)


def test_the_command_is_the_same_in_any_order_and_says_no_path(folder, tmp_path, capsys):
    tiny_traces(tmp_path / "a")
    words = ["evaluate", f"--traces={tmp_path / 'a'}", "--record", "--budget", "8", str(folder), "--json", "-"]
    assert main(words) == 0
    (recorded,) = json.loads((folder / "config.json").read_text())["figures"]
    assert recorded["command"] == "moe-beyond evaluate cross_layer.tiny-tests --traces DIR --budget 8"


def test_the_command_keeps_what_an_option_names_too(tmp_path):
    (tmp_path / "mine").mkdir()
    words = ["history.x", "--profile", "history.x", "--scores", str(tmp_path / "mine"), "--record"]
    kept = "moe-beyond evaluate history.x --traces DIR --profile history.x --scores mine"
    assert _command(words, "history.x", "history.x") == kept


def test_a_card_whose_marks_are_damaged_is_left_alone(folder, tmp_path, capsys):
    tiny_traces(tmp_path / "a")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("<!-- end of figures -->", ""))
    before = card.read_text()
    words = ["evaluate", folder, "--traces", tmp_path / "a", "--budget", "8", "--record"]
    assert "has no line <!-- end of figures -->" in error_line(capsys, words)
    assert card.read_text() == before


def test_a_second_evaluation_replaces_the_first_on_the_same_data_alone(folder, tmp_path, capsys):
    for name, seed in (("a", 5), ("b", 6)):
        tiny_traces(tmp_path / name, seed=seed)
        evaluated(folder, tmp_path / name, capsys, "--record")
    evaluated(folder, tmp_path / "a", capsys, "--policy", "belief", "--record")
    evaluated(folder, tmp_path / "a", capsys, "--split", "train", "--record")
    figures = json.loads((folder / "config.json").read_text())["figures"]
    assert ["belief" in one["command"] for one in figures] == [False, True, False]
    assert [one["split"] for one in figures] == [None, None, "train"]


def test_what_was_written_by_hand_stays(folder, tmp_path, capsys):
    tiny_traces(tmp_path / "a")
    card = folder / "README.md"
    card.write_text("Mine, above.\n\n" + card.read_text() + "\nMine, below.\n")
    evaluated(folder, tmp_path / "a", capsys, "--record")
    once = card.read_text()
    evaluated(folder, tmp_path / "a", capsys, "--record")
    assert card.read_text() == once
    assert once.startswith("Mine, above.")
    assert once.endswith("Mine, below.\n")
    assert "recall@2" in once


def test_only_a_predictor_folder_takes_figures(run, tmp_path, capsys):
    tiny_traces(tmp_path / "a")
    words = ["evaluate", run.folder, "--traces", tmp_path / "a", "--record"]
    assert "is a run" in error_line(capsys, words)
    assert "is a run of several checkpoints" in error_line(capsys, [*words[:-1], "--bootstrap", "200"])


def test_the_list_shows_what_was_recorded(folder, tmp_path, capsys, monkeypatch):
    tiny_traces(tmp_path / "a")
    more = ("--policy", "belief", "--prefetch", "none", "--prefetch", "top2", "--budget", "16", "--record")
    said = evaluated(folder, tmp_path / "a", capsys, *more)
    monkeypatch.setattr(published, "checkpoint_folders", lambda: [tmp_path])
    assert main(["list", "--json", "-"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["predictors"]
    assert one["name"] == folder.name
    assert one["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    weights = read_predictor(folder).state_dict().values()
    assert one["parameters"] == sum(weight.numel() for weight in weights if weight.is_floating_point())
    assert main(["list"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert folder.name in shown
    assert ", ".join(f"{row['lookahead']}: {100 * row['recall_at_k']:.1f}" for row in said["metrics"]) in shown
    own = [row for row in said["results"] if row["predictor"] and row["budget_slots"] == 8 and row["bytes_ratio"] <= 1]
    best = max(own, key=lambda row: row["hit_rate"])
    plain = {row["strategy"]: row for row in said["results"] if row["budget_slots"] == 8 and not row["predictor"]}
    for row in (best, plain["lru"], plain["belady"]):
        assert f"8 │ {row['hit_rate']:.1%} @ {row['bytes_ratio']:.2f}" in shown


def test_every_published_predictor_is_listed(capsys):
    assert main(["list", "--json", "-"]) == 0
    listed = [one["name"] for one in json.loads(capsys.readouterr().out)["predictors"]]
    assert listed == published.list_pretrained() != []
