"""Fitting by gradient descent."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.fields import check_kinds
from moe_beyond.predictors.base import GradientPredictor, Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.io.folder import check_fits, read_config, read_predictor
from moe_beyond.predictors.limits import OPTIMIZATION
from moe_beyond.pretrained import find_predictor
from moe_beyond.tasks.base import PredictorTask


class GradientTask(PredictorTask):
    """AdamW with a linear warm-up and a cosine to zero, stepped at every optimiser step of the whole fit.

    Args:
        predictor: What is fitted.
        lr: Highest learning rate.
        weight_decay: Of matrices; biases and norms have none.
        warmup: Share of all steps until the highest learning rate.
        compiled: Whether the objective is compiled, which takes half a minute once, and a C++ compiler.
        teachers: Predictors, as folders, published names or ``hf:ORG/REPO``; what is fitted is half what was chosen,
            and half the mean of their probabilities (Hinton, Vinyals and Dean 2015, arXiv 1503.02531).
    """

    def __init__(
        self,
        predictor: GradientPredictor,
        lr: float,
        weight_decay: float,
        warmup: float,
        compiled: bool = False,
        teachers: Sequence[str] | None = None,
    ) -> None:
        super().__init__(predictor)
        settings = {"lr": lr, "weight_decay": weight_decay, "warmup": warmup}
        check_kinds(OPTIMIZATION, settings, f"{predictor.architecture}: ")
        self._teacher_folders, self._teachers = tuple(teachers or ()), list[Predictor]()
        # What a boolean picks has a size that only the data know: no recompiling when it changes.
        self._objective = torch.compile(predictor.loss, dynamic=True) if compiled else predictor.loss
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup

    @property
    def fitted(self) -> GradientPredictor:
        """The predictor, by what it can do."""
        assert isinstance(self.predictor, GradientPredictor)
        return self.predictor

    def setup(self, stage: str) -> None:
        """Before a fit, load the teachers as well."""
        if stage == "fit":
            self._teachers = [self._teacher(folder) for folder in self._teacher_folders]
        super().setup(stage)
        # What is fitted may learn from states that it will not have itself.
        self.data.hidden_states |= any(teacher.information.hidden_states for teacher in self._teachers)

    def _teacher(self, name: str) -> Predictor:
        """Load a predictor to learn from.

        Raises:
            UserError: It predicts something else than what is fitted, or was fitted with another tokenizer.
        """
        folder, pupil = find_predictor(name), self.predictor
        teacher = read_predictor(folder)
        kinds = [(one.information.lookaheads, one.activation, one.geometry.shape()) for one in (teacher, pupil)]
        if kinds[0] != kinds[1]:
            theirs, ours = (f"lookaheads {', '.join(map(str, kind[0]))}, activation {kind[1]}" for kind in kinds)
            raise UserError(
                f"teacher {name}: has {theirs} of {teacher.geometry.describe_shape()}, "
                f"but what is fitted has {ours} of {pupil.geometry.describe_shape()}"
            )
        tokenizer = read_config(folder)["training"].get("tokenizer", {}).get("sha256")
        check_fits(teacher, self.data.manifest, self.data.traces.folder, tokenizer)
        return teacher

    def recipe(self) -> dict[str, Any]:
        """Return the optimiser's settings as well."""
        taught = {"teachers": len(self._teachers)} if self._teachers else {}
        optimizer = {"lr": self.lr, "weight decay": self.weight_decay, "warmup": self.warmup}
        return super().recipe() | optimizer | taught

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the predictor's loss.

        Raises:
            UserError: The loss is not finite.
        """
        logits = self.fitted(batch)
        loss = self._objective(logits, batch, self._taught(batch))
        if not torch.isfinite(loss):
            names = ", ".join(sorted(set(batch.sequence_ids))[:4])
            raise UserError(
                f"loss is {loss.item()} at step {self.global_step}, on sequences {names}, ...; lower the lr"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=int(batch.lengths.sum()), sync_dist=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Tensor | None:
        """Return what to fit in place of the choices ``(B, T, H, L, E)``, if there is a teacher."""
        if not self._teachers:
            return None
        told = torch.stack([t.to(self.device).probabilities(t(batch)) for t in self._teachers]).mean(0)
        return (told + batch.targets(self.predictor.geometry.num_experts)[:, :, None]) / 2

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule."""
        matrices = [p for p in self.fitted.parameters() if p.ndim > 1]
        vectors = [p for p in self.fitted.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.lr)
        self.planned_steps = steps = planned_steps(self.trainer)
        rising = max(1, round(self.warmup * steps))

        def rate(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def planned_steps(trainer: L.Trainer) -> int:
    """Return the optimiser steps that a fit makes, from its first epoch to its last; the same after a resume.

    It is exact, but for a fit that ends early (early stopping, ``max_time``): every epoch has the same number of
    batches, the last gradients of an epoch are stepped however few were accumulated.

    Args:
        trainer: Trainer whose training data are attached.

    Raises:
        UserError: The fit has no end.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise UserError(
            "trainer.max_epochs is -1, so the learning rate has no step to fall to zero at; set trainer.max_epochs or "
            "trainer.max_steps"
        )
    steps = int(trainer.estimated_stepping_batches)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler) and trainer.max_epochs != -1:
            epochs = map(callback.get_accumulate_grad_batches, range(trainer.max_epochs or 0))
            steps = sum(math.ceil(trainer.num_training_batches / accumulated) for accumulated in epochs)
            steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return max(1, steps)
