"""Every option of Lightning's Trainer, with values that work and values that do not, through the command line."""

import inspect
from pathlib import Path

import lightning as L
import pytest
import torch
from _helpers.common import failure, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER

from moe_beyond.cli.main import main
from moe_beyond.predictors.io.folder import read_predictor

WORK = {
    "accelerator": ("cpu",),
    "strategy": ("auto",),
    "devices": ("1",),
    "num_nodes": (),
    "precision": ("bf16-mixed",),
    "logger": ("false", "WandbLogger"),
    "callbacks": ("ExportBest",),
    "fast_dev_run": (),
    "max_epochs": ("2",),
    "min_epochs": ("1",),
    "max_steps": ("1",),
    "min_steps": ("1",),
    "max_time": ("00:00:10:00",),
    "limit_train_batches": ("0.5",),
    "limit_val_batches": ("0",),
    "limit_test_batches": ("1",),
    "limit_predict_batches": ("1",),
    "overfit_batches": ("2", "0.5"),
    "val_check_interval": ("0.5",),
    "check_val_every_n_epoch": ("1",),
    "num_sanity_val_steps": ("1",),
    "log_every_n_steps": ("1",),
    "enable_checkpointing": ("true",),
    "enable_progress_bar": ("false",),
    "enable_model_summary": ("false",),
    "accumulate_grad_batches": ("2",),
    "gradient_clip_val": ("0.5",),
    "gradient_clip_algorithm": ("value",),
    "deterministic": ("true",),
    "benchmark": ("true",),
    "inference_mode": ("false",),
    "use_distributed_sampler": ("false",),
    "profiler": ("simple",),
    "detect_anomaly": ("true",),
    "barebones": (),
    "plugins": ("TorchSyncBatchNorm",),
    "sync_batchnorm": ("true",),
    "reload_dataloaders_every_n_epochs": ("1",),
    "default_root_dir": ("somewhere",),
    "enable_autolog_hparams": ("false",),
    "model_registry": (),
}
"""Values with which a fit runs and exports a predictor."""
FAIL = {
    "accelerator": ("abacus", *(() if torch.cuda.is_available() else ("cuda",))),
    "strategy": ("abacus", "deepspeed"),
    "devices": ("0", "x", "-2"),
    "num_nodes": ("0", "x"),
    "precision": ("fp16", "transformer-engine", "16-true", "64-true"),
    "logger": ("NoLogger", "MLFlowLogger", "TensorBoardLogger"),
    "callbacks": ("NoCallback", "EarlyStopping", "no.such.Callback"),
    "fast_dev_run": ("x", "-1"),
    "max_epochs": ("x", "0", "-1", "-5"),
    "min_epochs": ("x",),
    "max_steps": ("x", "0", "-5"),
    "min_steps": ("x",),
    "max_time": ("soon", "00:00:00:00"),
    "limit_train_batches": ("x", "0", "-1", "1.5"),
    "limit_val_batches": ("x", "-1", "1.5"),
    "limit_test_batches": ("x", "-1"),
    "limit_predict_batches": ("x", "-1"),
    "overfit_batches": ("x", "-1", "1.5"),
    "val_check_interval": ("x", "0", "-1", "1.5", "1000"),
    "check_val_every_n_epoch": ("x", "0"),
    "num_sanity_val_steps": ("x",),
    "log_every_n_steps": ("x", "0"),
    "enable_checkpointing": ("x", "false"),
    "enable_progress_bar": ("x",),
    "enable_model_summary": ("x",),
    "accumulate_grad_batches": ("x", "0", "-1"),
    "gradient_clip_val": ("x", "-1"),
    "gradient_clip_algorithm": ("nope",),
    "deterministic": ("x",),
    "benchmark": ("x",),
    "inference_mode": ("x",),
    "use_distributed_sampler": ("x",),
    "profiler": ("nope",),
    "detect_anomaly": ("x",),
    "barebones": ("x", "true"),
    "plugins": ("nope",),
    "sync_batchnorm": ("x",),
    "reload_dataloaders_every_n_epochs": ("x", "-1"),
    "default_root_dir": (),
    "enable_autolog_hparams": ("x",),
    "model_registry": (),
}
"""Values that are refused."""
PARSED = {
    "accelerator": ("gpu", "mps"),
    "strategy": ("ddp", "fsdp"),
    "devices": ("8", "[0,1]"),
    "num_nodes": ("2",),
    "fast_dev_run": ("true", "3"),
    "barebones": ("true",),
    "model_registry": ("name",),
    "precision": ("16-mixed",),
}
"""Values that need other machines, or leave nothing to look at."""


def cases(values: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(name, value) for name, several in values.items() for value in several]


def words(*more: str) -> list[str]:
    """A tiny fit of the shipped configs."""
    configs = [f"{CONFIGS / name}.yaml" for name in ("trainer/default", "model/cross_layer", "data/traces")]
    tiny = [*TINY_CROSS_LAYER, "--data.traces=traces", "--data.max_tokens=16"]
    return ["fit", *(word for path in [*configs, "small.yaml"] for word in ("-c", path)), *tiny, *more]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the files that `words` need."""
    tiny_traces(tmp_path / "traces", sequences=24)
    (tmp_path / "small.yaml").write_text(
        "trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1}\n"
        "data: {class_path: TraceDataModule, init_args: {token_budget: 64}}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_option_is_tried() -> None:
    options = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert options == set(WORK) == set(FAIL)
    assert all(WORK[name] or PARSED[name] for name in options)
    assert all(FAIL[name] for name in options - {"default_root_dir", "model_registry"})  # which are any text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), cases(WORK))
def test_a_value_that_works(here: Path, name: str, value: str) -> None:
    before = {path.name for path in here.iterdir()}
    assert main(words(f"--trainer.{name}={value}")) == 0
    (exported,) = here.rglob("predictor/config.json")
    assert read_predictor(exported.parent).architecture == "cross_layer"
    # Nothing lands in the working folder but the folder of runs.
    allowed = {"runs", "lightning_logs"} if name == "logger" else {"runs"}
    assert {path.name for path in here.iterdir()} - before <= allowed
    (run,) = {path.parent for path in here.rglob("config.yaml")}
    assert run == exported.parents[1]
    assert all(path.parents[1] == run for path in here.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), cases(FAIL))
def test_a_value_that_does_not_work_is_one_line_and_leaves_nothing(here: Path, capsys, name: str, value: str) -> None:
    said = failure(capsys, here, words("--quiet", f"--trainer.{name}={value}"))
    assert not any(phrase in said for phrase in ("Union", "Subtypes", "<class", "Traceback", "Namespace("))


@pytest.mark.parametrize(("name", "value"), cases(PARSED))
def test_a_value_for_another_machine_is_parsed(here: Path, capsys, name: str, value: str) -> None:
    assert main(words(f"--trainer.{name}={value}", "--print_config")) == 0
    assert f"{name}:" in capsys.readouterr().out
