"""Fitting by counting: one pass, no optimiser."""

from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.tasks.base import PredictorTask


class CountingTask(PredictorTask):
    """Feeds every training batch to a counting predictor once, then adds up what all ranks counted.

    Args:
        predictor: What is fitted.
    """

    def __init__(self, predictor: CountingPredictor) -> None:
        super().__init__(predictor)
        self.counting = predictor
        self.automatic_optimization = False

    def on_fit_start(self) -> None:
        """Refuse a second pass, which would count everything twice.

        Raises:
            UserError: The trainer is set to anything but one epoch.
        """
        if self.trainer.max_epochs != 1:
            raise UserError(
                f"a counting predictor takes one pass; set trainer.max_epochs to 1, not {self.trainer.max_epochs}"
            )

    def training_step(self, batch: Batch, _: int) -> None:
        """Count a batch."""
        self.counting.observe(batch)

    def on_train_epoch_end(self) -> None:
        """Add up the ranks' counts."""
        if self.trainer.world_size > 1:
            for counts in self.counting.counts():
                gathered = self.all_gather(counts)
                assert isinstance(gathered, Tensor)
                counts.copy_(gathered.sum(0))

    def configure_optimizers(self) -> None:
        """There is none."""
