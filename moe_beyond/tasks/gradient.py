"""Fitting by gradient descent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, WeightAveraging
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.json_fields import check_fields
from moe_beyond.predictors.argument_limits import OPTIMIZATION
from moe_beyond.predictors.base import GradientPredictor, Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.io.folder import check_fits, check_projection, read_config, read_predictor
from moe_beyond.pretrained import find_predictor
from moe_beyond.tasks.adamw import AdamWSettings
from moe_beyond.tasks.base import PredictorTask


class GradientTask(PredictorTask):
    """Fits a predictor by gradient descent.

    Args:
        predictor: Predictor to fit.
        optimizer: Settings of the optimiser, or their dictionary (default: those of `AdamWSettings`).
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``
            (default: none). A teacher has all lookaheads of the fitted predictor, and may have more. The targets are
            then the mean of the labels and of the teachers' mean probabilities (Hinton, Vinyals and Dean 2015, arXiv
            1503.02531).

    Raises:
        UserError: A setting is out of range, or the predictor cannot be saved.
    """

    def __init__(
        self,
        predictor: GradientPredictor,
        optimizer: AdamWSettings | Mapping[str, float] | None = None,
        compiled: bool = False,
        teachers: Sequence[str] | None = None,
    ) -> None:
        settings = optimizer if isinstance(optimizer, AdamWSettings) else AdamWSettings(**(optimizer or {}))
        check_fields(OPTIMIZATION, settings.to_json(), f"{predictor.architecture}: ")
        super().__init__(predictor, optimizer=settings.to_json(), teachers=list(teachers or ()))
        self._teacher_names, self._teachers = tuple(teachers or ()), list[Predictor]()
        # A boolean mask selects a number of tokens that only the data determine: avoid recompiling when it changes.
        self._objective = torch.compile(predictor.loss, dynamic=True) if compiled else predictor.loss
        self.optimizer = settings

    @property
    def fitted(self) -> GradientPredictor:
        """The predictor, as a `GradientPredictor`."""
        assert isinstance(self.predictor, GradientPredictor)
        return self.predictor

    def setup(self, stage: str) -> None:
        """Load the teachers before a fit."""
        if stage == "fit":
            self._teachers = [self._teacher(name) for name in self._teacher_names]
        super().setup(stage)
        # A teacher may read hidden states that the predictor does not read.
        self.data.hidden_states |= any(teacher.information.hidden_states for teacher in self._teachers)

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse averages of buffers.

        Raises:
            UserError: A callback averages buffers. They hold ids, which an average in float32 rounds.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and vars(callback)["_use_buffers"]:
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} averages buffers, which hold ids (got use_buffers "
                    "true); set use_buffers to false"
                )

    def _teacher(self, name: str) -> Predictor:
        """Load a teacher.

        Raises:
            UserError: The teacher lacks a lookahead, or has another activation, model shape or tokenizer.
        """
        folder, student = find_predictor(name), self.predictor
        teacher = read_predictor(folder)
        ours, theirs = student.information.lookaheads, teacher.information.lookaheads
        kinds = [(p.activation, p.geometry.shape()) for p in (teacher, student)]
        if lacking := [str(lookahead) for lookahead in ours if lookahead not in theirs]:
            raise UserError(
                f"teacher {name}: has {_described(teacher)}, and lacks lookahead {', '.join(lacking)} of the fitted "
                "predictor; choose another teacher, or fit fewer lookaheads"
            )
        if kinds[0] != kinds[1]:
            raise UserError(
                f"teacher {name}: has {_described(teacher)}, but the fitted predictor has {_described(student)}"
            )
        tokenizer = (read_config(folder)["training"].get("tokenizer") or {}).get("sha256")
        check_fits(teacher, self.data.manifest, self.data.traces.folder, tokenizer)
        check_projection(teacher, self.data.traces)
        return teacher

    def recipe(self) -> dict[str, Any]:
        """Return the settings, including those of the optimiser."""
        settings = self.optimizer
        recipe = {"lr": settings.lr, "weight decay": settings.weight_decay, "warmup": settings.warmup}
        return super().recipe() | recipe | ({"teachers": len(self._teachers)} if self._teachers else {})

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the predictor's loss.

        Raises:
            UserError: The loss is not finite.
        """
        logits = self.fitted(batch)
        loss = self._objective(logits, batch, self._soft_targets(batch))
        if not torch.isfinite(loss):
            names = ", ".join(sorted(set(batch.sequence_ids))[:4])
            raise UserError(
                f"loss is {loss.item()} at step {self.global_step}, on sequences {names}, ...; lower model.optimizer.lr"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=int(batch.lengths.sum()), sync_dist=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    @torch.no_grad()
    def _soft_targets(self, batch: Batch) -> Tensor | None:
        """Return targets ``(B, T, H, L, E)`` that replace the labels, or None without teachers."""
        if not self._teachers:
            return None
        probabilities = torch.stack([self._taught(teacher, batch) for teacher in self._teachers]).mean(0)
        return (probabilities + batch.targets(self.predictor.geometry.num_experts)[:, :, None]) / 2

    def _taught(self, teacher: Predictor, batch: Batch) -> Tensor:
        """Return a teacher's probabilities ``(B, T, H, L, E)`` of the fitted predictor's H lookaheads."""
        theirs = teacher.information.lookaheads
        slices = [theirs.index(lookahead) for lookahead in self.predictor.information.lookaheads]
        return teacher.to(self.device).probabilities(teacher(batch))[:, :, slices]

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule."""
        self.planned_steps = planned_steps(self.trainer)
        optimizer, schedule = self.optimizer.build(self.fitted.parameters(), self.planned_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _described(predictor: Predictor) -> str:
    """Describe what a teacher and the fitted predictor must have in common."""
    lookaheads = ", ".join(map(str, predictor.information.lookaheads))
    return f"lookaheads {lookaheads}, activation {predictor.activation} of {predictor.geometry.describe_shape()}"


def planned_steps(trainer: L.Trainer) -> int:
    """Return the number of optimiser steps of a whole fit; a resumed fit has the same number.

    The number is exact unless the fit ends early (early stopping, ``max_time``). Every epoch has the same number of
    batches, and the last batches of an epoch make a step even if they are fewer than ``accumulate_grad_batches``.

    Args:
        trainer: Trainer with attached training data.

    Raises:
        UserError: Neither ``max_epochs`` nor ``max_steps`` limits the fit.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise UserError(
            "trainer.max_epochs: without a last step the learning rate cannot fall to zero (got -1); "
            "set trainer.max_epochs or trainer.max_steps"
        )
    steps = int(trainer.estimated_stepping_batches)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler) and trainer.max_epochs != -1:
            epochs = map(callback.get_accumulate_grad_batches, range(trainer.max_epochs or 0))
            steps = sum(math.ceil(trainer.num_training_batches / accumulated) for accumulated in epochs)
            steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return max(1, steps)
