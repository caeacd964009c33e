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
        self.automatic_optimization = False

    @property
    def counting(self) -> CountingPredictor:
        """The predictor, by what it can do."""
        assert isinstance(self.predictor, CountingPredictor)
        return self.predictor

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
        """Count a batch; after the last one, add up the ranks' counts.

        A batch counts as a step: without any, Lightning would save no checkpoint.
        """
        self.counting.observe(batch)
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()
        if self.trainer.is_last_batch and self.trainer.world_size > 1:  # before validation, which needs all counts
            for counts in self.counting.counts():
                gathered = self.all_gather(counts)
                assert isinstance(gathered, Tensor)
                counts.copy_(gathered.sum(0))

    def configure_optimizers(self) -> None:
        """There is none."""
