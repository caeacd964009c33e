"""Fitting by gradient descent."""

import math
from typing import Any

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.tasks.base import PredictorTask


class GradientTask(PredictorTask):
    """AdamW with a linear warm-up and a cosine to zero, stepped at every batch.

    Args:
        predictor: What is fitted.
        lr: Highest learning rate.
        weight_decay: Of matrices; biases and norms have none.
        warmup: Share of all steps until the highest learning rate.
    """

    def __init__(self, predictor: GradientPredictor, lr: float, weight_decay: float, warmup: float) -> None:
        super().__init__(predictor)
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup

    @property
    def fitted(self) -> GradientPredictor:
        """The predictor, by what it can do."""
        assert isinstance(self.predictor, GradientPredictor)
        return self.predictor

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the predictor's loss.

        Raises:
            UserError: The loss is not finite.
        """
        loss = self.fitted.loss(self.fitted(batch), batch)
        if not torch.isfinite(loss):
            names = ", ".join(sorted(set(batch.sequence_ids))[:4])
            raise UserError(
                f"loss is {loss.item()} at step {self.global_step}, on sequences {names}, ...; lower the lr"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=int(batch.lengths.sum()))
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule."""
        matrices = [p for p in self.fitted.parameters() if p.ndim > 1]
        vectors = [p for p in self.fitted.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.lr)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        rising = max(1, round(self.warmup * steps))

        def rate(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
