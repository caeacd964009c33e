"""Fitting by counting: one pass, no optimiser."""

import lightning as L

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.tasks.base import PredictorTask


class CountingTask(PredictorTask):
    """Feeds every training batch to a counting predictor once.

    Args:
        predictor: What is fitted.
    """

    def __init__(self, predictor: CountingPredictor) -> None:
        super().__init__(predictor)
        self.automatic_optimization = False

    @property
    def counting(self) -> CountingPredictor:
        """The predictor, by what it can do."""
        assert isinstance(self.predictor, CountingPredictor)
        return self.predictor

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse a second pass, which would count twice, several processes, which count apart, and rounded counts.

        Raises:
            UserError: The trainer is set to anything but one epoch, to several processes, to half precision, or to
                clip gradients.
        """
        if trainer.max_epochs != 1:
            raise UserError(
                f"a counting predictor takes one pass; set trainer.max_epochs to 1, not {trainer.max_epochs}"
            )
        if not trainer.precision.startswith(("32", "64")):
            raise UserError(f"a counting predictor counts; set trainer.precision to 32-true, not {trainer.precision}")
        if trainer.gradient_clip_val:
            raise UserError(
                "a counting predictor has no gradients to clip; use trainer/counting, "
                "or set trainer.gradient_clip_val to null"
            )
        if trainer.world_size > 1:
            raise UserError(
                f"a counting predictor is fitted by one process, in seconds; set trainer.devices to 1, "
                f"not {trainer.world_size} processes"
            )

    def training_step(self, batch: Batch, _: int) -> None:
        """Count a batch. It counts as a step: without any, Lightning would save no checkpoint."""
        self.counting.observe(batch)
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()

    def configure_optimizers(self) -> None:
        """There is none."""
