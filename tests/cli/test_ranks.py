"""Two processes train together, and leave what one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _helpers.common import tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER
from _helpers.wandb_files import offline_runs
from safetensors.torch import load_file

from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.traces.reader import TraceSet


def command(folder: Path, *words: str, ranks: str = "2") -> subprocess.CompletedProcess[str]:
    trainer = (f"--trainer.devices={ranks}", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    whole = [sys.executable, "-m", "moe_beyond", *words, *trainer]
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
def test_two_ranks_count_and_validate_exactly_what_one_does(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=60)
    assert len(traces.shards("validation")) >= 2  # each rank validates other sequences
    configs = [f"{CONFIGS / name}.yaml" for name in ("trainer/counting", "model/history", "data/traces")]
    words = ["fit", *(word for path in configs for word in ("-c", path)), "--data.traces=../traces"]
    found = []
    for ranks in ("1", "2"):
        folder = tmp_path / ranks
        folder.mkdir()
        done = command(folder, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        run = folder / "runs/predictor/version_0"
        weights = load_file(run / "predictor/model.safetensors")
        found.append((weights, (run / "metrics.csv").read_text()))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert found[0][1] == found[1][1]
