"""What wandb keeps of a fit, read back from the files it writes without a server."""

import base64
import csv
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from _helpers.common import TINY, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, fit
from _helpers.wandb_files import OfflineRun, offline_runs

import moe_beyond
from moe_beyond.cli.main import main
from moe_beyond.traces.reader import TraceSet

KEY = "0123456789abcdef0123456789abcdef01234567"
WORDS = (
    *("-c", str(CONFIGS / "trainer/default.yaml"), "-c", str(CONFIGS / "model/cross_layer.yaml")),
    *("--data.token_budget=64", "--data.max_tokens=16", "--trainer.log_every_n_steps=1", *TINY_CROSS_LAYER),
    "--model.memory_prefixes=0",  # prefixes of random text add noise, and the third epoch must be the best
)
STRATEGIES = ("lru + top2", "lru", "belady")


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """wandb without a server, and with nothing of this machine's user."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", KEY)
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
        yield patch


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, away: Any) -> Path:
    """A folder in a git repository, where a fit of two epochs ran and another resumed it for a third."""
    folder = tmp_path_factory.mktemp("tracked")
    git = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for words in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "start")):
        subprocess.run([*git, *words], cwd=folder, check=True)
    tiny_traces(folder / "traces", sequences=24)
    first = fit(folder, folder / "traces", *WORDS, "--trainer.max_epochs=2")
    resumed = f"--ckpt_path={first / 'checkpoints/last.ckpt'}"
    fit(folder, folder / "traces", *WORDS, "--trainer.max_epochs=3", resumed)
    return folder


@pytest.fixture(scope="module")
def runs(tracked: Path) -> list[OfflineRun]:
    return offline_runs(tracked)


def test_each_fit_is_a_run_and_a_resumed_one_says_what_it_resumes(tracked: Path, runs: list[OfflineRun]) -> None:
    first, second = runs
    assert first.run.run_id != second.run.run_id
    assert [run.exit_code for run in runs] == [0, 0]
    assert "from" not in first.config
    checkpoint = tracked / "runs/predictor/version_0/checkpoints/last.ckpt"
    assert second.config["from"] == {"checkpoint": str(checkpoint), "run": first.run.run_id}
    assert {path.name for path in (tracked / "runs").iterdir()} == {"predictor", "wandb"}


def test_the_configuration_says_all_that_made_the_run(tracked: Path, runs: list[OfflineRun]) -> None:
    config = runs[0].config
    assert config["model"]["init_args"]["width"] == 16
    assert config["trainer"]["max_epochs"] == 2
    assert config["geometry"] == TINY.to_json()
    assert config["moe_beyond"] == moe_beyond.__version__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tracked, capture_output=True, text=True, check=True)
    assert config["git"] == {"commit": commit.stdout.strip(), "dirty": False}
    traces = TraceSet(str(tracked / "traces"))
    for name, split in (("train_traces", "train"), ("val_traces", "validation")):
        assert config[name]["fingerprint"] == traces.manifest.fingerprint
        assert config[name]["split"] == split
        assert config[name]["tokens"] == sum(len(trace) for trace in traces.traces(split))
    assert runs[0].run.job_type == "fit"
    assert runs[0].run.project == "moe-beyond"


def test_no_secret_is_written(tracked: Path, runs: list[OfflineRun]) -> None:
    written = [path for path in tracked.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_figures_are_those_of_the_csv_logger(tracked: Path, runs: list[OfflineRun]) -> None:
    for version, run in enumerate(runs):
        rows = list(csv.DictReader((tracked / f"runs/predictor/version_{version}/metrics.csv").open()))
        budget = "val_budget_10pct"
        names = ("train/loss", "train/lr", "val/loss", "val/recall_at_k", "val_lookahead_2/nll")
        for name in (*names, f"{budget}/hit_rate", f"{budget}/belady_bytes_ratio"):
            kept = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            seen = [(row["trainer/global_step"], row[name]) for row in run.history if name in row]
            assert seen == [(step, pytest.approx(value, rel=1e-6)) for step, value in kept]
        assert len([row for row in run.history if "val/recall_at_k" in row]) == 2 - version


def test_each_number_stands_once_in_a_section_of_its_own(runs: list[OfflineRun]) -> None:
    scalars = {name for row in runs[0].history for name, value in row.items() if isinstance(value, (int, float))}
    sections: dict[str, set[str]] = {}
    for name in scalars - {"_timestamp", "_runtime", "_step", "epoch", "trainer/global_step"}:
        section, figure = name.split("/")
        sections.setdefault(section, set()).add(figure)
    assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", section) for section in sections)  # as wandb's queries want names
    lookaheads = {f"val_lookahead_{lookahead}" for lookahead in (1, 2, 3, "next")}
    budgets = {f"val_budget_{share}pct" for share in (10, 20, 30, 50)}
    assert set(sections) == {"train", "val", *lookaheads, *budgets}
    assert sections["train"] == {"loss", "lr"}
    assert sections["val"] == {"loss", "recall_at_k"}
    assert sections["val_lookahead_2"] == sections["val_lookahead_1"] | {"recall_at_k"}
    replayed = {f"{name}{figure}" for name in ("", "lru_", "belady_") for figure in ("hit_rate", "bytes_ratio")}
    assert all(sections[budget] == replayed for budget in budgets)
    # No two figures of the predictor are the same number under two names.
    names = [f"{section}/{figure}" for section in lookaheads for figure in sections[section]]
    values = [runs[0].last(name) for name in (*names, "val/loss", "val/recall_at_k")]
    assert len({value for value in values if value}) == len([value for value in values if value])


def test_a_run_has_a_name_and_tags(runs: list[OfflineRun]) -> None:
    assert [run.run.display_name for run in runs] == ["cross_layer-traces-v0", "cross_layer-traces-v1"]
    assert list(runs[0].run.tags) == ["cross_layer", "tiny", "tests"]


def test_names_and_tags_of_the_user_stay(tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_TAGS", "mine")
    more = tmp_path / "logger.yaml"
    more.write_text("trainer: {logger: {class_path: WandbLogger, init_args: {save_dir: runs, name: ours}}}\n")
    monkeypatch.chdir(tmp_path)
    words = ("-c", str(CONFIGS / "data/traces.yaml"), f"--data.traces={tracked / 'traces'}")
    assert main(["fit", *words, *WORDS, "-c", str(more), "--trainer.max_epochs=1"]) == 0
    (run,) = offline_runs(tmp_path)
    assert (run.run.display_name, list(run.run.tags)) == ("ours", ["mine"])
    # Without a CSV logger the run's folder is that of its checkpoints, and not the working folder.
    (folder,) = tmp_path.glob(f"runs/*/{run.run.run_id}")
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "config.yaml", "predictor"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "logger.yaml"}


def test_tables_and_curves_tell_layers_and_budgets(tracked: Path, runs: list[OfflineRun]) -> None:
    run = runs[0]
    by_layer = run.table("val/by_layer")
    assert [(row["lookahead"], row["layer"]) for row in by_layer] == [
        (lookahead, layer) for lookahead in ("1", "2", "3", "next") for layer in TINY.moe_layers
    ]
    for lookahead in ("1", "next"):
        recall = [row["recall_at_k"] for row in by_layer if row["lookahead"] == lookahead]
        section = "val" if lookahead == "1" else f"val_lookahead_{lookahead}"
        assert sum(recall) / 4 == pytest.approx(run.last(f"{section}/recall_at_k"))
    replay = run.table("val/replay")
    assert [(row["budget_slots"], row["strategy"]) for row in replay] == [
        (slots, strategy) for slots in (3, 6, 9, 16) for strategy in STRATEGIES
    ]
    starts = [f"val_budget_{share}pct/{name}" for share in (10, 20, 30, 50) for name in ("", "lru_", "belady_")]
    for row, start in zip(replay, starts, strict=True):
        assert row["hit_rate"] == pytest.approx(run.last(f"{start}hit_rate"))
        assert row["bytes_ratio"] == pytest.approx(run.last(f"{start}bytes_ratio"))
    for curve, x in (("hits_by_budget", "budget_share"), ("hits_by_bytes", "bytes_ratio")):
        points = run.table(f"Custom Chart Tables/val/{curve}_table")
        assert {(p["lineKey"], p["step"], p["lineVal"]) for p in points} == {
            (row["strategy"], row[x], row["hit_rate"]) for row in replay
        }
        assert run.config["_wandb"]["visualize"][f"val/{curve}"]["panel_config"]["panelDefId"] == "wandb/lineseries/v0"
    assert len(run.table("Custom Chart Tables/val/recall_by_layer_table")) == len(by_layer)


def test_checkpoints_and_the_predictor_are_artifacts(tracked: Path, runs: list[OfflineRun]) -> None:
    for version, run in enumerate(runs):
        folder = tracked / f"runs/predictor/version_{version}"
        best, last, predictor = run.artifacts_of("model", "predictor")
        for artifact, alias, path in (
            (best, "best", next(folder.glob("checkpoints/epoch=*.ckpt"))),
            (last, "last", folder / "checkpoints/last.ckpt"),
        ):
            assert (artifact.name, artifact.type) == (f"model-{run.run.run_id}", "model")
            assert alias in artifact.aliases
            assert files(artifact) == {"model.ckpt": md5(path)}
        assert (predictor.name, predictor.type) == ("cross_layer.tiny", "predictor")
        assert files(predictor) == {path.name: md5(path) for path in (folder / "predictor").iterdir()}


def files(artifact: Any) -> dict[str, str]:
    """The digest of each file of an artifact."""
    return {entry.path: entry.digest for entry in artifact.manifest.contents}


def md5(path: Path) -> str:
    """A file's digest as artifacts have it."""
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


def test_a_test_is_a_run_and_a_prediction_is_none(
    tracked: Path, runs: list[OfflineRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracked / "runs/predictor/version_0"
    words = ["-c", str(run / "config.yaml"), f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]
    monkeypatch.chdir(tmp_path)
    for verb in ("predict", "test"):
        assert main([verb, *words]) == 0
    (tested,) = offline_runs(tmp_path)
    assert tested.run.job_type == "test"
    assert tested.config["from"]["run"] == runs[0].run.run_id
    assert tested.config["test_traces"]["split"] == "validation"
    assert len(tested.table("test/replay")) == 12


def test_a_fit_that_fails_is_a_failed_run(
    tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("-c", str(CONFIGS / "data/traces.yaml"), f"--data.traces={tracked / 'traces'}")
    assert main(["fit", *words, *WORDS, "--model.optimizer.lr=1e30"]) == 2
    assert "lower model.optimizer.lr" in capsys.readouterr().err
    (failed,) = offline_runs(tmp_path)
    assert failed.exit_code == 1
    assert not failed.artifacts
