"""Fits that are stopped anywhere and resumed end as fits that never stopped."""

import contextlib
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import tiny_traces
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from moe_beyond.callbacks import ExportBest
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.predictors.folder import load_predictor
from moe_beyond.tasks import CrossLayer, PredictorTask

SIZES: dict[str, Any] = {"width": 16, "heads": 2, "depth": 1, "window": 8, "layer_width": 16}
EVENTS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


class Killed(BaseException):
    """Ends a fit where nothing expects it."""


class Watch(L.Callback):
    """Notes what a fit does, after all other callbacks, and ends it at one of its events."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.events = kill_at, list[str]()
        self.rates: dict[int, float] = {}
        self.recalls: dict[int, float] = {}
        self.logged: dict[int, int] = {}

    def event(self, name: str, trainer: L.Trainer) -> None:
        if trainer.sanity_checking:
            return
        if name == "on_train_batch_start" and trainer.optimizers:
            self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]
            self.logged[trainer.global_step] = trainer.fit_loop.epoch_loop._batches_that_stepped
        if name == "on_validation_end":
            self.recalls[trainer.global_step] = float(trainer.callback_metrics["val/recall_at_k"])
        self.events.append(name)
        if len(self.events) - 1 == self.kill_at:
            raise Killed


for name in EVENTS:  # the same for each
    setattr(Watch, name, lambda self, trainer, *_, _name=name, **__: self.event(_name, trainer))


@dataclass
class Fit:
    """How a fit ended."""

    events: list[str]
    rates: dict[int, float]
    recalls: dict[int, float]
    logged: dict[int, int]
    planned: int | None
    steps: int
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    exported: dict[str, torch.Tensor] = field(default_factory=dict)


def fit(
    folder: Path,
    traces: Path,
    *,
    kill_at: int | None = None,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    task: type[PredictorTask] = CrossLayer,
    saving: dict[str, Any] | None = None,
    **trainer: Any,
) -> Fit:
    """Fit, with the shipped dropout, until the end or until it is killed."""
    L.seed_everything(1 if resume else 0, verbose=False)  # what is drawn before a step decides nothing
    module = TraceDataModule(str(traces), **{"token_budget": 64, "max_tokens": 16, "window": 1, **(data or {})})
    fitted = task(module.geometry.to_json(), module.vocab_size, **(SIZES if model is None else model))  # type: ignore[call-arg]
    watch = Watch(kill_at)
    callbacks = [
        ModelCheckpoint(monitor="val/recall_at_k", mode="max", filename="{epoch}-{step}"),
        ModelCheckpoint(filename="last", enable_version_counter=False, **(saving or {"every_n_train_steps": 1})),
        ExportBest(),
        watch,
    ]
    # A callback that is no checkpoint's would run before those.
    loop = L.Trainer(
        logger=CSVLogger(folder, name="run"), callbacks=callbacks, accelerator="cpu", gradient_clip_val=1.0,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": 3, **trainer},
    )  # fmt: skip
    loop.callbacks = [one for one in loop.callbacks if one is not watch] + [watch]
    with contextlib.suppress(Killed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.fit(fitted, module, ckpt_path=None if resume is None else str(resume))
    done = Fit(watch.events, watch.rates, watch.recalls, watch.logged, fitted.planned_steps, loop.global_step)
    done.weights = {name: tensor.clone() for name, tensor in fitted.state_dict().items()}
    if (folder / "run/version_0/predictor").exists():
        done.exported = load_predictor(folder / "run/version_0/predictor").state_dict()
    return done
