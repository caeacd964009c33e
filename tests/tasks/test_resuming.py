"""Fits that are stopped anywhere and resumed end as fits that never stopped."""

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from _helpers.common import tiny_traces
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from moe_beyond.callbacks import ExportBest
from moe_beyond.cli.resuming import newest_checkpoint
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.tasks import CrossLayerTask, PopularityTask, PredictorTask
from moe_beyond.tasks.resuming import seed_batch

SIZES: dict[str, Any] = {"width": 16, "heads": 2, "depth": 1, "window": 8, "layer_width": 16}
EVENTS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


class Killed(BaseException):
    """Ends a fit at an unexpected moment."""


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
            groups = trainer.optimizers[0].param_groups  # none where a predictor counts
            self.rates[trainer.global_step] = groups[0]["lr"] if groups else 0.0
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
    task: type[PredictorTask] = CrossLayerTask,
    saving: dict[str, Any] | None = None,
    stopping: dict[str, Any] | None = None,
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
        *([] if stopping is None else [EarlyStopping("val/recall_at_k", **stopping)]),
    ]
    loop = L.Trainer(
        logger=CSVLogger(folder, name="run"), callbacks=callbacks, accelerator="cpu",
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": 3, "gradient_clip_val": 1.0, **trainer},
    )  # fmt: skip
    # Lightning puts checkpoints last; the watch comes after them.
    loop.callbacks = [one for one in loop.callbacks if one is not watch] + [watch]
    with contextlib.suppress(Killed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.fit(fitted, module, ckpt_path=None if resume is None else str(resume))
    done = Fit(watch.events, watch.rates, watch.recalls, watch.logged, fitted.planned_steps, loop.global_step)
    done.weights = {name: tensor.clone() for name, tensor in fitted.state_dict().items()}
    if (folder / "run/version_0/predictor").exists():
        done.exported = read_predictor(folder / "run/version_0/predictor").state_dict()
    return done


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace set of more shards than a window has."""
    folder = tmp_path_factory.mktemp("resuming") / "traces"
    assert len(tiny_traces(folder, sequences=24).shards("train")) > 1
    return folder


def assert_resumes(expected: Fit, kill_at: int, folder: Path, traces: Path, **how: Any) -> None:
    """Kill a fit at an event, resume it, and compare it with one that was never stopped."""
    killed = fit(folder / "killed", traces, kill_at=kill_at, **how)
    assert killed.events == expected.events[: kill_at + 1]
    resumed = fit(folder / "resumed", traces, resume=newest_checkpoint(folder / "killed"), **how)
    where = f"event {kill_at}, {expected.events[kill_at]}"
    assert (resumed.planned, resumed.steps) == (expected.planned, expected.steps), where
    assert {**killed.rates, **resumed.rates} == expected.rates, where
    assert {**killed.recalls, **resumed.recalls} == expected.recalls, where
    assert all(step == logged for step, logged in resumed.logged.items()), where
    for ours, theirs in ((resumed.weights, expected.weights), (resumed.exported, expected.exported)):
        assert ours.keys() == theirs.keys(), where
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), where


@pytest.fixture(scope="module")
def undisturbed(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fit]:
    """Fits that are never stopped, each kind once."""
    done: dict[str, Fit] = {}

    def fit_once(**how: Any) -> Fit:
        if str(how) not in done:
            done[str(how)] = fit(tmp_path_factory.mktemp("undisturbed"), traces, **how)
        return done[str(how)]

    return fit_once


def nth(events: list[str], name: str, number: int) -> int:
    """Where an event comes for the n-th time; -1 for the last."""
    return [at for at, event in enumerate(events) if event == name][number]


@pytest.mark.parametrize(
    ("event", "number", "how"),
    [
        ("on_train_batch_end", 7, {}),  # within the second epoch
        ("on_train_batch_end", -1, {}),  # before the last validation
        ("on_validation_batch_end", -1, {"saving": {}}),  # the newest checkpoint is of the epoch before
        ("on_train_epoch_end", 0, {}),
        ("on_train_batch_end", 4, {"accumulate_grad_batches": 3}),  # between two optimiser steps
        ("on_train_epoch_end", 0, {"max_steps": 13, "max_epochs": -1}),
        ("on_train_batch_end", -1, {"max_steps": 13, "max_epochs": -1}),
    ],
)
def test_a_killed_fit_ends_as_one_that_never_stopped(
    event: str, number: int, how: dict[str, Any], undisturbed: Callable[..., Fit], traces: Path, tmp_path: Path
) -> None:
    expected = undisturbed(**how)
    assert_resumes(expected, nth(expected.events, event, number), tmp_path, traces, **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"val_check_interval": 0.5},
        {"val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3},
        {"max_steps": 12, "max_epochs": -1},
        {"limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
    ],
    ids=str,
)
def test_a_fit_may_be_killed_anywhere(
    how: dict[str, Any], undisturbed: Callable[..., Fit], traces: Path, tmp_path: Path
) -> None:
    expected = undisturbed(**how)
    first = nth(expected.events, "on_train_batch_end", how.get("accumulate_grad_batches", 1) - 1)
    for kill_at in range(first, len(expected.events)):
        assert_resumes(expected, kill_at, tmp_path / str(kill_at), traces, **how)


BATCHES = 6
"""Number of batches per epoch of these traces, at the settings of `fit`."""


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ({"max_epochs": 2}, 2 * BATCHES),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 2 * 2),
        ({"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": 3}, 2 * 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 2 * 3),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 8}, 8),
    ],
    ids=str,
)
def test_as_many_steps_are_made_as_planned(how: dict[str, Any], steps: int, traces: Path, tmp_path: Path) -> None:
    done = fit(tmp_path, traces, **how)
    assert (done.planned, done.steps) == (steps, steps)
    assert list(done.rates) == list(range(steps))
    # Linear to the highest rate, a cosine to zero: one rising step of so few.
    expected = [1.5e-3 * 0.5 * (1 + np.cos(np.pi * (step - 1) / (steps - 1))) for step in range(1, steps)]
    assert list(done.rates.values()) == pytest.approx([1.5e-3, *expected])


def test_an_endless_fit_is_refused(traces: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"trainer\.max_epochs: .* \(got -1\); set trainer.max_epochs or trainer.max_steps"
    ):
        fit(tmp_path, traces, max_epochs=-1)


@pytest.mark.parametrize("epoch_end", [True, False])
def test_a_fit_that_had_stopped_early_does_not_go_on(epoch_end: bool, traces: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "stopping": {"mode": "min", "patience": 1, "min_delta": 1.0, "check_on_train_epoch_end": epoch_end},
        "saving": {"save_on_train_epoch_end": epoch_end}, "max_epochs": 5,
    }  # fmt: skip
    expected = fit(tmp_path / "undisturbed", traces, **how)
    assert expected.steps == 2 * BATCHES
    kill_at = nth(expected.events, "on_train_epoch_end" if epoch_end else "on_validation_end", -1)
    fit(tmp_path / "killed", traces, kill_at=kill_at, **how)
    resumed = fit(tmp_path / "resumed", traces, resume=newest_checkpoint(tmp_path / "killed"), **how)
    assert resumed.steps == expected.steps
    assert all(torch.equal(resumed.exported[name], tensor) for name, tensor in expected.exported.items())


def test_counting_goes_on_where_it_stopped(traces: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"task": PopularityTask, "model": {}, "max_epochs": 1, "gradient_clip_val": None}
    expected = fit(tmp_path / "undisturbed", traces, **how)
    assert expected.steps == BATCHES
    assert_resumes(expected, nth(expected.events, "on_train_batch_end", 2), tmp_path, traces, **how)


def test_another_cut_of_the_epoch_is_refused_within_it_and_fine_at_its_end(traces: Path, tmp_path: Path) -> None:
    killed = fit(tmp_path / "whole", traces, max_epochs=1)
    end = newest_checkpoint(tmp_path / "whole")
    assert fit(tmp_path / "more", traces, resume=end, max_epochs=2, data={"token_budget": 32}).steps > killed.steps
    fit(tmp_path / "killed", traces, kill_at=nth(killed.events, "on_train_batch_end", 1))
    middle = newest_checkpoint(tmp_path / "killed")
    with pytest.raises(UserError, match=r"last.ckpt: stopped within an epoch.* token_budget 64; got token_budget 32"):
        fit(tmp_path / "other", traces, resume=middle, data={"token_budget": 32})


def test_weights_alone_are_no_checkpoint_to_resume(traces: Path, tmp_path: Path) -> None:
    fit(tmp_path / "a", traces, max_epochs=1, saving={"save_weights_only": True})
    with pytest.raises(UserError, match="has weights without the state of the optimiser"):
        fit(tmp_path / "b", traces, resume=tmp_path / "a/run/version_0/checkpoints/last.ckpt")


def test_a_longer_plan_is_said(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "a", traces, max_epochs=1)
    fit(tmp_path / "b", traces, max_epochs=2, resume=newest_checkpoint(tmp_path / "a"))
    assert "planned for 6 steps, now for 12; the learning rate follows" in capsys.readouterr().err


def test_a_run_that_was_moved_keeps_its_best(undisturbed: Callable[..., Fit], traces: Path, tmp_path: Path) -> None:
    expected = undisturbed()
    fit(tmp_path / "a", traces, kill_at=nth(expected.events, "on_train_batch_end", 7))
    (tmp_path / "a").rename(tmp_path / "moved")
    resumed = fit(tmp_path / "b", traces, resume=newest_checkpoint(tmp_path / "moved"))
    assert all(torch.equal(resumed.exported[name], tensor) for name, tensor in expected.exported.items())


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    def draws(*batch: int) -> tuple[float, float, float]:
        seed_batch(*batch)
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    first = draws(0, 1, 2, 0)
    assert draws(0, 1, 2, 0) == first
    others = [draws(*batch) for batch in ((1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1))]
    assert len({first, *others}) == 5
