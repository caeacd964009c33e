"""``--online`` of ``evaluate`` and ``replay``: figures with and without updates, files of the state, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.scoring import history_folder, scores_folder

from moe_beyond.cli.main import main
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.predictors.online import OnlineUpdates
from moe_beyond.testing.predictors import probabilities
from moe_beyond.traces.reader import TraceSet


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces that have holes, a predictor, and stored scores."""
    folder = tmp_path_factory.mktemp("house")
    traces = tiny_traces(folder / "traces", sequences=12, longest=30, holes=0.2)
    history_folder(folder / "history", traces)
    scores_folder(folder / "scores", tiny_traces(folder / "whole"))
    return folder


@pytest.fixture(autouse=True)
def _there(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house)


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main([*words, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def recall(corrected: bool) -> float:
    """Recall of all sequences in file order, by plain sums."""
    traces, predictor = TraceSet("traces"), read_predictor("history")
    updates, found, selected = OnlineUpdates(predictor), 0, 0
    for trace in traces.traces():
        scores = probabilities(predictor, collate([trace]))[0]
        if corrected:
            scores = updates.correct(trace.token_ids, trace.experts, scores)
        best = np.argsort(-scores[:, 0], axis=-1, kind="stable")[..., : traces.geometry.top_k]
        there = trace.experts < traces.geometry.num_experts
        found += int(((trace.experts[..., None] == best[..., None, :]).any(-1) & there).sum())
        selected += int(there.sum())
    return found / selected


def test_evaluate_shows_figures_with_and_without_updates(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "history", "--traces", "traces", "--split", "all", "--budget", "25%", "--policy", "belief"]
    plain, online = json_of(capsys, *words), json_of(capsys, *words, "--online")
    assert online["without_updates"] == {name: plain[name] for name in ("metrics", "results")}
    # Equal scores are in another order there, which moves an expert or two.
    assert online["metrics"][0]["recall_at_k"] == pytest.approx(recall(True), abs=5e-4)
    assert plain["metrics"][0]["recall_at_k"] == pytest.approx(recall(False), abs=5e-4)
    assert online["metrics"][0]["recall_at_k"] != plain["metrics"][0]["recall_at_k"]
    assert [row["predictor"] for row in online["results"]] == ["history online", None, None, None]
    assert main([*words, "--online"]) == 0
    out = capsys.readouterr().out
    for text in ("with online updates", "online", "scores: history, history online", "belady"):
        assert text in out
    assert json_of(capsys, *words, "--online") == online


def test_replay_has_the_results_of_evaluate_and_keeps_a_state(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--traces", "traces", "--split", "all", "--budget", "25%", "--prefetch", "p>0.2"]
    evaluated = json_of(capsys, "evaluate", "history", *words, "--online")
    state = str(tmp_path / "state.safetensors")
    replay = ["replay", "--predictor", "history", *words, "--online", "--online-state", state]
    first, table = json_of(capsys, *replay), Path(state).read_bytes()
    assert first["results"] == evaluated["results"]
    second = json_of(capsys, *replay)  # continues with the table of the first
    assert second["results"] != first["results"]
    notes = [{row.get("note") for row in found["results"] if row["predictor"]} for found in (first, second)]
    assert notes == [{None}, {"starts with stored corrections; text that they were learned on is not held out"}]
    predictor, traces = read_predictor("history"), TraceSet("traces")
    updates = OnlineUpdates(predictor)
    for _ in range(2):
        for trace in traces.traces():
            updates.correct(trace.token_ids, trace.experts, probabilities(predictor, collate([trace]))[0])
    updates.save(tmp_path / "twice.safetensors")
    assert Path(state).read_bytes() == (tmp_path / "twice.safetensors").read_bytes() != table


REPLAY = ("replay", "--traces", "traces", "--predictor", "history", "--online")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*REPLAY, "--workers", "2"], "--workers: online updates read one sequence after another"),
        ([*REPLAY, "--batch-size", "2"], "--batch-size: online updates read one sequence after another"),
        ([*REPLAY, "--strategy", "all"], "--online: excludes --strategy; leave one of them out"),
        ([*REPLAY, "--online-state", "."], "--online-state .: is a folder; name a file"),
        ([*REPLAY, "--online-state", "history/model.safetensors"], "history/model.safetensors: is no file of online"),
        ([*REPLAY, "--as-run"], "--online: --as-run repeats the choice of the run"),
        (["replay", "--traces", "whole", "--scores", "scores", "--online"], "(got --scores); give --predictor"),
        (["replay", "--traces", "traces", "--online"], "--online: corrects the scores of a predictor (got none)"),
        ([*REPLAY[:-1], "--online-state", "file"], "--online-state: is the file of --online; add --online"),
        (["evaluate", "history", "--traces", "traces", "--online", "--record"], "--online: excludes --record"),
        (["evaluate", "history", "--traces", "traces", "--online", "--workers", "3"], "--workers: online updates read"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in error_line(capsys, words)


def test_nothing_is_written_if_no_strategy_reads_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*REPLAY, "--policy", "lru", "--prefetch", "none", "--online-state", "unread"]) == 2
    assert "no strategy reads scores" in capsys.readouterr().err
    assert not Path("unread").exists()
