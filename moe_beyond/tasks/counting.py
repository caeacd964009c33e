"""Fitting by counting: one pass, no optimiser."""

import lightning as L

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.tasks.base import PredictorTask


class CountingTask(PredictorTask):
    """Passes every training batch once to a counting predictor.

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
        """Require one epoch, one process and full precision.

        More epochs would count twice, processes do not share counts, and half precision rounds them.

        Raises:
            UserError: The trainer has several epochs or processes, half precision, or clips gradients.
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
        if trainer.world_size > 1:
            raise UserError(
                f"trainer.devices: a counting predictor needs one process (got {trainer.world_size}); set it to 1"
            )

    def training_step(self, batch: Batch, _: int) -> None:
        """Count a batch, and report a step to Lightning, which saves no checkpoint without steps."""
        self.counting.partial_fit(batch)
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()

    def configure_optimizers(self) -> None:
        """Return no optimiser."""
