"""The files of a fit, that a failed fit leaves none, and that a quiet fit prints nothing."""

import json
from pathlib import Path

import pytest
from _helpers.common import failure, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, Run
from _helpers.wandb_files import offline_runs

from moe_beyond.cli.main import main
from moe_beyond.predictors.io.folder import read_predictor

CONFIG_WORDS = [
    word
    for name in ("trainer/default", "model/cross_layer", "data/traces")
    for word in ("-c", str(CONFIGS / f"{name}.yaml"))
]
SMALL = ["--data.token_budget=64", "--data.max_tokens=16", "--trainer.max_epochs=1", *TINY_CROSS_LAYER]
WRITTEN = {"checkpoints", "config.yaml", "predictor"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a trace set and somebody's checkpoints in it."""
    tiny_traces(tmp_path / "traces")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*words: str) -> int:
    return main(["fit", *CONFIG_WORDS, *SMALL, "--data.traces=traces", *words])


def test_runs_without_a_logger_have_folders_like_others(here: Path) -> None:
    for version in range(2):
        assert fit("--trainer.logger=false") == 0
        run = here / f"runs/predictor/version_{version}"
        assert {path.name for path in run.iterdir()} == WRITTEN
        assert read_predictor(run / "predictor").architecture == "cross_layer"
    assert {path.name for path in here.iterdir()} == {"traces", "checkpoints", "runs"}
    assert not list((here / "checkpoints").iterdir())
    # The run's own configuration leads to a folder of its own again.
    words = ["-c", str(run / "config.yaml"), f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]
    assert main(["predict", *words]) == 0
    assert {path.name for path in (here / "runs/predictor/version_2").iterdir()} == {"scores"}


def test_a_trial_run_leaves_nothing(here: Path) -> None:
    before = sorted(here.rglob("*"))
    assert fit("--trainer.fast_dev_run=true") == 0
    assert sorted(here.rglob("*")) == before


def test_a_folder_that_the_user_names_is_taken(here: Path) -> None:
    assert fit("--trainer.logger=false", "--trainer.default_root_dir=mine") == 0
    assert {path.name for path in (here / "mine").iterdir()} == WRITTEN
    assert not (here / "runs").exists()


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_fit_that_fails_before_its_first_step_leaves_no_run(
    here: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("HOME", str(here.parent / "home"))
    kept = here / "runs/predictor/version_0"
    kept.mkdir(parents=True)
    for words in (
        ["--data.val_split=dev"],
        # Lightning and the callback print this after the loggers have started.
        ["--trainer.val_check_interval=1000"],
        ["--trainer.callbacks.lookahead=7"],
    ):
        failure(capsys, here, ["fit", *CONFIG_WORDS, *SMALL, "--data.traces=traces", "--quiet", *words])
    assert list((here / "runs").rglob("*")) == [here / "runs/predictor", kept]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_the_other_verbs_leave_no_run_either(
    run: Run, here: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb, "-c", str(run.folder / "config.yaml"), f"--ckpt_path={run.folder / 'checkpoints/last.ckpt'}"]
    callbacks = here / "callbacks.yaml"
    callbacks.write_text("trainer: {callbacks: {class_path: CacheReplay, init_args: {lookahead: 7}}}\n")
    assert "has no lookahead 7" in failure(capsys, here, [*words, "--quiet", "-c", callbacks])


def test_a_quiet_fit_says_nothing(here: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(here.parent / "home"))
    assert fit("--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert len(offline_runs(here)) == 1
    run = here / "runs/predictor/version_0"
    for verb in ("validate", "test", "predict"):
        words = ["-c", str(run / "config.yaml"), f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--quiet"]
        assert main([verb, *words]) == 0
        assert capfd.readouterr() == ("", ""), verb
    assert fit("--quiet", "--json=r.json") == 0
    figures = json.loads((here / "r.json").read_text())["metrics"]
    assert {"train/loss", "val/loss", "val/recall_at_k", "val_budget_10pct/hit_rate"} <= set(figures)
    assert capfd.readouterr() == ("", "")


def test_a_replay_has_its_budget_from_a_flag(here: Path) -> None:
    assert fit("--trainer.callbacks.budget=25%", "--json=r.json") == 0
    figures = json.loads((here / "r.json").read_text())["metrics"]
    assert "val_budget_25pct/hit_rate" in figures
    assert "val_budget_10pct/hit_rate" not in figures
