"""Data module, task and callbacks in a plain `lightning.Trainer`, without this package's command line."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from _helpers.common import tiny_traces
from cli.test_configs import READ_STATES, TINY_SIZES

import moe_beyond.tasks
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.tasks import TASKS, AdamWSettings, CountingTask, CrossLayerTask, GradientTask


def example() -> str:
    """The code block of the docstring of `moe_beyond.tasks`."""
    _, _, after = inspect.getdoc(moe_beyond.tasks).partition("```python\n")  # type: ignore[union-attr]
    return after.partition("```")[0]


def test_the_example_fits_replays_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(example().strip().splitlines()) <= 16
    monkeypatch.chdir(tmp_path)
    tiny_traces(tmp_path / "traces" / "puffin")
    names: dict[str, Any] = {}
    exec(example().replace("max_epochs=8", "max_epochs=1"), names)
    assert "val_budget_10pct/hit_rate" in names["trainer"].callback_metrics
    assert read_predictor(names["export"].exported).architecture == "cross_layer"


def small(name: str) -> dict[str, Any]:
    """The arguments of a task that make its predictor tiny."""
    options = (option.removeprefix("--model.").split("=") for option in TINY_SIZES[name])
    return {argument: int(value) for argument, value in options}


@pytest.mark.parametrize("name", TASKS)
def test_a_checkpoint_restores_its_task(name: str, tmp_path: Path) -> None:
    states = name in READ_STATES
    data = TraceDataModule(tiny_traces(tmp_path / "traces", hidden_states=states).folder)
    sizes = {"hidden_size": data.hidden_size} if states else {}
    task = TASKS[name](geometry=data.geometry, vocab_size=data.vocab_size, **sizes, **small(name))
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, data)
    (path,) = tmp_path.glob("checkpoints/*.ckpt")
    batch = next(iter(data.val_dataloader()))
    for options in ({}, {"weights_only": True}):
        restored = TASKS[name].load_from_checkpoint(path, **options)
        assert restored.hparams == task.hparams
        assert restored.predictor.fitted_on == task.trained_on
        with torch.inference_mode():
            expected, scores = (t.predict_step(batch, 0).numpy() for t in (task.eval(), restored.eval()))
        assert np.array_equal(expected, scores)


def test_there_is_a_task_for_every_architecture() -> None:
    assert list(TASKS) == list(ARCHITECTURES)
    for name, task in TASKS.items():
        assert task.__name__ == f"{ARCHITECTURES[name].__name__}Task"
        assert issubclass(task, CountingTask if issubclass(ARCHITECTURES[name], CountingPredictor) else GradientTask)
        assert task.__name__ in moe_beyond.tasks.__all__


def test_a_geometry_or_its_dictionary(tmp_path: Path) -> None:
    data = TraceDataModule(tiny_traces(tmp_path).folder)
    sizes = {"width": 16, "heads": 2, "layer_width": 16, "optimizer": AdamWSettings(lr=0.1)}
    one, other = (CrossLayerTask(g, data.vocab_size, **sizes) for g in (data.geometry, data.geometry.to_json()))
    assert one.hparams == other.hparams
    assert one.optimizer == AdamWSettings(lr=0.1)
    with pytest.raises(UserError, match="geometry"):
        CrossLayerTask({"model": "x"}, data.vocab_size)


class Unregistered(Popularity):
    """Nothing could load it."""

    architecture = "unregistered"


class Unstorable(Popularity):
    """Has an argument that JSON cannot store."""

    def __init__(self, geometry: Any, vocab_size: int, weight: Any = np.float32) -> None:
        super().__init__(geometry, vocab_size)
        self.weight = weight


@pytest.mark.parametrize(
    ("predictor", "registered", "reason"),
    [
        (Unregistered, False, "is not registered under this name"),
        (Unstorable, True, "popularity: weight is not a plain JSON value .*; use numbers, text or lists"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_it_is_fitted(
    predictor: type[Popularity], registered: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TraceDataModule(tiny_traces(tmp_path).folder)
    if registered:
        monkeypatch.setitem(ARCHITECTURES._registered, predictor.architecture, predictor)
    with pytest.raises(UserError, match=reason):
        CountingTask(predictor(data.geometry, data.vocab_size))


def test_another_data_module_is_an_error_in_one_line(tmp_path: Path) -> None:
    data = TraceDataModule(tiny_traces(tmp_path).folder)
    task = moe_beyond.tasks.PopularityTask(data.geometry, data.vocab_size)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with pytest.raises(TypeError, match="PopularityTask: the data module is a LightningDataModule; use a TraceData"):
        trainer.fit(task, datamodule=L.LightningDataModule())
