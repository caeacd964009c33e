"""Two processes train together, and leave what one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _helpers.common import tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER
from _helpers.wandb_files import offline_runs

from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.traces.reader import TraceSet

RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "moe_beyond", *words, *RANKS]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_two_ranks_fit_and_predict(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces", sequences=24)
    configs = [f"{CONFIGS / name}.yaml" for name in ("trainer/default", "model/cross_layer", "data/traces")]
    words = [word for path in configs for word in ("-c", path)]
    sizes = (*TINY_CROSS_LAYER, "--data.traces=traces", "--data.token_budget=64", "--trainer.max_epochs=1")
    done = command(tmp_path, "fit", *words, *sizes)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    run = tmp_path / "runs/predictor/version_0"
    assert [path.name for path in (tmp_path / "runs/predictor").iterdir()] == ["version_0"]
    assert read_predictor(run / "predictor").architecture == "cross_layer"
    (tracked,) = offline_runs(tmp_path)
    assert len(tracked.artifacts_of("model", "predictor")) == 3
    checkpoint = next(run.glob("checkpoints/epoch*.ckpt"))
    done = command(tmp_path, "predict", "-c", str(run / "config.yaml"), f"--ckpt_path={checkpoint}")
    assert done.returncode == 0, done.stderr
    scores = ScoresFolder(next((tmp_path / "runs/predictor").glob("version_*/scores")))
    for trace in TraceSet(str(tmp_path / "traces")).traces("validation"):
        assert scores.scores(trace.sequence_id, len(trace)).shape[0] == len(trace)


@pytest.mark.slow
def test_counting_is_for_one_process(tmp_path: Path) -> None:
    tiny_traces(tmp_path / "traces")
    configs = [f"{CONFIGS / name}.yaml" for name in ("trainer/counting", "model/token_table", "data/traces")]
    done = command(tmp_path, "fit", *(word for path in configs for word in ("-c", path)), "--data.traces=traces")
    assert done.returncode == 2
    assert "a counting predictor needs one process" in done.stderr
    assert not list(tmp_path.glob("runs/*/*"))
