"""What every task does: validate, test, predict, and say in its checkpoints what it fitted."""

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.datamodules.provenance import fitted_on
from moe_beyond.errors import UserError
from moe_beyond.metrics import RoutingMetrics
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.checkpoint import CHECKPOINT_KEY
from moe_beyond.predictors.folder import check_fits


class PredictorTask(L.LightningModule):
    """Fits one predictor on what a `TraceDataModule` streams.

    Validation, test and prediction steps return ``(B, T, H, L, E)`` probabilities, so that callbacks can replay them
    without a second forward.

    Args:
        predictor: What is fitted.

    Attributes:
        measured: Figures of the last validation or test, as `RoutingMetrics.to_rows` gives them.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor
        lookaheads = len(predictor.information.lookaheads)
        shape = predictor.geometry.shape()
        self.val_metrics = RoutingMetrics(lookaheads, *shape)
        self.test_metrics = RoutingMetrics(lookaheads, *shape)
        self.training: bool
        self.trained_on: dict[str, Any] = {}
        self.measured: list[dict[str, Any]] = []

    @property
    def data(self) -> TraceDataModule:
        """The attached data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TraceDataModule):
            raise TypeError(f"{type(self).__name__} reads a TraceDataModule, not {type(data).__name__}")
        return data

    def recipe(self) -> dict[str, Any]:
        """Return what a reader needs to fit the same again, besides the predictor's arguments, as plain values."""
        seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning notes it
        return {
            "seed": None if seed is None else int(seed),
            "epochs": self.trainer.max_epochs,
            "precision": self.trainer.precision,
            "tokens a batch": self.data.token_budget,
            "tokens a piece": self.data.max_tokens,
        }

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse a trainer that the predictor cannot be fitted with; nothing by default."""

    def on_fit_start(self) -> None:
        """Check the trainer, also where no command line did."""
        self.check_trainer(self.trainer)

    def setup(self, stage: str) -> None:
        """Ask for what the predictor reads; before a fit, take in its vocabulary and note what the fit is on.

        Raises:
            UserError: The traces are of another shape, or have no token ids where the predictor reads them.
        """
        self.data.hidden_states = self.predictor.information.hidden_states is not None
        if stage == "fit":
            check_fits(self.predictor, self.data.manifest, self.data.traces.folder)
            self.predictor.prepare(self.data.training_text())
            self.trained_on = {**fitted_on(self.data), "recipe": self.recipe()}
            self.predictor.fitted_on = self.trained_on

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch, and return its probabilities."""
        return self._count(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch, and return its probabilities."""
        return self._count(batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a batch's probabilities."""
        return self.predictor.probabilities(self.predictor(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of each lookahead."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the figures of each lookahead."""
        self._log_metrics("test", self.test_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are, in plain values, so that `package` and `evaluate` need no config."""
        checkpoint[CHECKPOINT_KEY] = {
            "architecture": self.predictor.architecture,
            "arguments": self.predictor.arguments(),
            "geometry": self.predictor.geometry.to_json(),
            "vocab_size": self.predictor.vocab_size,
            "training": self.trained_on,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what an earlier run noted.

        Raises:
            UserError: A fit would go on with other traces than it began with.
        """
        noted = checkpoint.get(CHECKPOINT_KEY, {}).get("training", {})
        if self.trained_on and noted.get("fingerprint") != self.trained_on["fingerprint"]:
            raise UserError(
                f"the checkpoint was fitted on another trace set ({noted.get('source')}) than this fit reads "
                f"({self.trained_on['source']}); resume with the same"
            )
        self.trained_on = noted

    def _count(self, batch: Batch, metrics: RoutingMetrics) -> Tensor:
        probabilities = self.predictor.probabilities(self.predictor(batch))
        experts = self.predictor.geometry.num_experts
        metrics.update(probabilities, batch.targets(experts), batch.mask, batch.gate_shares(experts))
        return probabilities

    def _log_metrics(self, stage: str, metrics: RoutingMetrics) -> None:
        self.measured = metrics.to_rows(self.predictor.information.lookaheads)
        metrics.reset()
        for row in self.measured:
            for name, value in row.items():
                if isinstance(value, float):
                    self.log(f"{stage}/{name}/lookahead_{row['lookahead']}", torch.tensor(value))
        self.log(f"{stage}/recall_at_k", torch.tensor(self.measured[0]["recall_at_k"]), prog_bar=True)
