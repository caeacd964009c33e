"""Fitting by counting: one pass, no optimiser."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.tasks.base import PredictorTask

NO_GRADIENT = "no_gradient"
"""Name of the parameter of `CountingTask`."""


class CountingTask(PredictorTask):
    """Passes every training batch once to a counting predictor.

    Under several ranks every rank counts all batches, because counts may depend on their order. The result therefore
    equals that of one rank.

    Args:
        predictor: Predictor to fit.
    """

    def __init__(self, predictor: CountingPredictor) -> None:
        super().__init__(predictor)
        self.automatic_optimization = False

    @property
    def counting(self) -> CountingPredictor:
        """The predictor, as a `CountingPredictor`."""
        assert isinstance(self.predictor, CountingPredictor)
        return self.predictor

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Require one epoch and full precision.

        More epochs would count twice, and half precision rounds counts.

        Raises:
            UserError: The trainer has several epochs, half precision, or clips gradients.
        """
        if trainer.max_epochs != 1:
            raise UserError(
                f"trainer.max_epochs: a counting predictor needs one epoch (got {trainer.max_epochs}); set it to 1"
            )
        if not trainer.precision.startswith(("32", "64")):
            raise UserError(
                f"trainer.precision: a counting predictor needs full precision (got {trainer.precision}); "
                "set it to 32-true"
            )
        if trainer.gradient_clip_val:
            raise UserError(
                "trainer.gradient_clip_val: a counting predictor has no gradients; "
                "use trainer/counting, or set it to null"
            )

    def setup(self, stage: str) -> None:
        """Let every rank read all training batches."""
        if stage == "fit":
            self.data.shares_training = False
            if isinstance(self.trainer.strategy, ParallelStrategy):  # which refuses a module without a parameter
                self.register_parameter(NO_GRADIENT, nn.Parameter(torch.zeros(())))
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the parameter, which a fit with one rank lacks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"].pop(NO_GRADIENT, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the parameter, which checkpoints lack."""
        super().on_load_checkpoint(checkpoint)
        if NO_GRADIENT in self._parameters:
            checkpoint["state_dict"][NO_GRADIENT] = self._parameters[NO_GRADIENT]

    def training_step(self, batch: Batch, _: int) -> None:
        """Count a batch, and report a step to Lightning, which saves no checkpoint without steps."""
        self.counting.partial_fit(batch)
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()

    def configure_optimizers(self) -> None:
        """Return no optimiser."""
