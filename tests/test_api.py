"""The package as a script or a notebook uses it: the same answers as the command line's."""

import json
from pathlib import Path

import pytest
from fitting import Run
from matplotlib.figure import Figure
from rich.table import Table
from scoring import history_folder

import moe_beyond as mb
from moe_beyond.cli.main import main
from moe_beyond.errors import UserError


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main([*words, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_replay_answers_as_the_command_does(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    traces, folder = mb.load_traces(run.traces), run.folder / "predictor"
    found = mb.replay(
        traces, folder, budget=["25%", 16], policy=["lru", "belief"], prefetch="top2", device="rtx4060-laptop"
    )
    words = ("--budget", "25%", "--budget", "16", "--policy", "lru", "--policy", "belief", "--prefetch", "top2")
    words = ("replay", "--traces", str(run.traces), *words, "--device", "rtx4060-laptop", "--predictor", str(folder))
    assert found.to_json() == said_by(capsys, *words)
    frame = found.to_pandas()
    assert list(frame["strategy"]) == [result.strategy for result in found.results]
    assert "hit_rate" in frame
    assert "per_layer" not in frame
    assert isinstance(found.table(), Table)
    assert found.plot().axes[0].get_ylabel() == "hit rate (%)"
    html = found._repr_html_()
    assert "belief + top2" in html
    assert "<script" not in html
    with pytest.raises(ValueError, match=r"moe_beyond\.evaluate does"):
        found.metrics_table()


def test_evaluate_answers_as_the_command_does(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.folder / "predictor"
    found = mb.evaluate(run.traces, folder, split="validation", budget="25%")
    words = ("evaluate", str(folder), "--traces", str(run.traces), "--split", "validation", "--budget", "25%")
    assert found.to_json() == said_by(capsys, *words)
    assert "recall@k" in found._repr_html_()
    # A loaded predictor scores alike, under its architecture's name.
    again = mb.evaluate(run.traces, mb.load_predictor(folder), split="validation", budget="25%")
    assert again.metrics == found.metrics


def test_without_a_predictor_of_one_budget(trace_set, tmp_path: Path) -> None:
    history_folder(tmp_path / "history", trace_set)
    found = mb.replay(trace_set, policy="belief", profile=str(tmp_path / "history"), split="train")
    assert [result.strategy for result in found.results] == ["belief", "lru", "belady", "static_hindsight"]
    assert isinstance(found.plot(), Figure)
    assert found.plot().axes[0].get_xlabel() == "bytes moved / bytes demanded"


def test_what_is_not_there_is_named(trace_set, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown option 'polcy'; did you mean 'policy'"):
        mb.replay(trace_set, polcy="lru")
    with pytest.raises(UserError, match="unknown policy"):
        mb.replay(trace_set, policy="lro")
    with pytest.raises(UserError, match="none"):
        mb.load_traces(tmp_path / "none")
    with pytest.raises(AttributeError, match="has no attribute 'reply'"):
        _ = mb.reply
    assert {"replay", "load_traces"} <= set(dir(mb))
