"""The base of all tasks: validation, test, prediction, checkpoints, and resuming from them."""

import os
import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.datamodules.provenance import fitted_on
from moe_beyond.errors import UserError
from moe_beyond.metrics import LookaheadMetrics, RoutingMetrics
from moe_beyond.metrics.exact import ExactMean
from moe_beyond.metrics.names import HEADLINE, lookahead_figures
from moe_beyond.predictors.base import GradientPredictor, Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.io.checkpoint import CHECKPOINT_KEY
from moe_beyond.predictors.io.folder import check_fits, check_projection, check_states
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.predictors.saveable import check_saveable
from moe_beyond.tasks.checkpoint_io import keep_checkpoints_whole
from moe_beyond.tasks.resuming import (
    RESUME_KEY,
    Progress,
    batches_to_skip,
    check_resumable,
    is_finishing,
    keep_best,
    progress_of,
    restore,
    seed_batch,
)


class PredictorTask(L.LightningModule):
    """Fits one predictor on the batches of a `TraceDataModule`.

    A resumed fit makes the same steps as an uninterrupted one: the same batches, learning rates, dropout and weights
    (see `moe_beyond.tasks.resuming`). This holds for any `lightning.Trainer`. Checkpoints are written atomically (see
    `moe_beyond.tasks.checkpoint_io`), and ``load_from_checkpoint`` of a task class rebuilds its task.

    Validation, test and prediction steps return probabilities ``(B, T, H, L, E)``, so that callbacks can replay them
    without a second forward.

    Args:
        predictor: Predictor to fit.
        hyperparameters: Further arguments of the subclass, as plain values for checkpoints.

    Attributes:
        measured: Figures of the last validation or test, one row per lookahead.
        planned_steps: Number of optimiser steps of the whole fit; None without a schedule.
        trained_on: Record of the training data.

    Raises:
        UserError: The predictor cannot be saved.
    """

    def __init__(self, predictor: Predictor, **hyperparameters: Any) -> None:
        super().__init__()
        check_saveable(predictor)
        given = {"geometry": predictor.geometry.to_json(), "vocab_size": predictor.vocab_size}
        # Logged by `SaveConfig`, with everything else.
        self.save_hyperparameters({**given, **hyperparameters, **predictor.arguments()}, logger=False)
        self.predictor = predictor
        lookaheads = len(predictor.information.lookaheads)
        shape = predictor.geometry.shape()
        self.val_metrics = RoutingMetrics(lookaheads, *shape)
        self.test_metrics = RoutingMetrics(lookaheads, *shape)
        self.losses = ExactMean()
        self.training: bool
        self.trained_on: dict[str, Any] = {}
        self.measured: list[LookaheadMetrics] = []
        self.planned_steps: int | None = None
        self._seed: int | None = None
        self._resumed: Progress | None = None
        self._planned_before: int | None = None
        self._figures_before: dict[str, Tensor] = {}
        self._lent_steps = 0
        self._stop_at_epoch_end = False

    @property
    def data(self) -> TraceDataModule:
        """The attached data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TraceDataModule):
            raise TypeError(f"{type(self).__name__}: the data module is a {type(data).__name__}; use a TraceDataModule")
        return data

    def recipe(self) -> dict[str, Any]:
        """Return the settings of the fit that a reader needs to repeat it, as plain values."""
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by Lightning
        return {
            "seed": None if seed is None else int(seed),
            "epochs": self.trainer.max_epochs,
            "precision": self.trainer.precision,
            "tokens per batch": self.data.token_budget,
            "tokens per segment": self.data.max_tokens,
        }

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Raise a `UserError` if the trainer cannot fit the predictor; accept any by default."""

    def on_fit_start(self) -> None:
        """Check the trainer, and prepare a resumed fit."""
        self.check_trainer(self.trainer)
        if self._resumed is not None:
            self._go_on(self._resumed)

    def _go_on(self, progress: Progress) -> None:
        """Correct Lightning's view of which epochs and steps are finished."""
        self._lent_steps = int(is_finishing(progress, self.trainer))
        self.trainer.fit_loop.epoch_loop.max_steps += self._lent_steps  # until the end of the epoch
        stopping = [callback for callback in self.trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        if any(callback.wait_count >= callback.patience for callback in stopping):
            self.trainer.should_stop = progress.batches == 0
            self._stop_at_epoch_end = progress.whole and progress.validated

    def on_train_start(self) -> None:
        """Set the seed of the fit, one for all ranks, and restore the figures that callbacks read."""
        self.trainer.callback_metrics.update(self._figures_before)
        if self._seed is None:
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):  # it acts only when an epoch starts
                callback.on_train_epoch_start(self.trainer)
        if self._planned_before not in (None, self.planned_steps) and self.trainer.is_global_zero:
            print(
                f"moe-beyond: the fit was planned for {self._planned_before} steps, now for {self.planned_steps}; "
                "the learning rate follows the new schedule from here",
                file=sys.stderr,
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step."""
        assert self._seed is not None
        seed_batch(self._seed, self.trainer.current_epoch, batch_idx, self.trainer.global_rank)

    def on_train_epoch_end(self) -> None:
        """Remove the extra step of `_go_on`, and stop if the earlier fit had stopped early."""
        self.trainer.should_stop |= self._stop_at_epoch_end
        self.trainer.fit_loop.epoch_loop.max_steps -= self._lent_steps
        self._lent_steps = 0

    def setup(self, stage: str) -> None:
        """Request hidden states if the predictor reads them; before a fit, prepare the predictor and record the data.

        Raises:
            UserError: The traces have another shape, lack token ids or hidden states that the predictor reads, or have
                hidden states of another width or projection.
        """
        self.data.hidden_states = bool(self.predictor.information.hidden_states)
        for traces in self.data.measured_sets:
            check_states(self.predictor, traces.manifest, traces.folder)
        if stage == "fit":
            keep_checkpoints_whole(self.trainer)
            self._seed = self._resumed = self._planned_before = self.planned_steps = None
            self._figures_before = {}
            self._lent_steps, self._stop_at_epoch_end = 0, False
            check_fits(self.predictor, self.data.manifest, self.data.traces.folder)
            self.predictor.prepare(self.data.training_stats())
            for traces in self.data.measured_sets:
                check_projection(self.predictor, traces)
            self.trained_on = {**fitted_on(self.data), "recipe": self.recipe()}
            self.predictor.fitted_on = self.trained_on
            # Buffers are equal on all ranks, which may take different numbers of validation batches.
            self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the metrics, and return its probabilities."""
        return self._count("val", batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the metrics, and return its probabilities."""
        return self._count("test", batch, self.test_metrics)

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
        """Store the predictor's description, which `package` and `evaluate` read, and the progress of the fit."""
        checkpoint[CHECKPOINT_KEY] = {
            "architecture": self.predictor.architecture,
            "package": ARCHITECTURES.package(self.predictor.architecture),
            "arguments": self.predictor.arguments(),
            "geometry": self.predictor.geometry.to_json(),
            "vocab_size": self.predictor.vocab_size,
            "training": self.trained_on,
            RESUME_KEY: {
                "progress": progress_of(self.trainer).to_json(),
                "seed": self._seed,
                "planned_steps": self.planned_steps,
                "figures": {name: value.detach().cpu() for name, value in self.trainer.callback_metrics.items()},
                "batching": self._batching(),
            },
        }

    def _batching(self) -> dict[str, Any]:
        """Return the settings that determine the batches of an epoch."""
        trainer = self.trainer
        return self.data.batching() | {
            "ranks": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "limit_train_batches": trainer.limit_train_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the record of the training data; in a fit, also the progress.

        Raises:
            UserError: The fit reads other traces than the checkpoint's fit, or cannot be resumed exactly.
        """
        training = checkpoint.get(CHECKPOINT_KEY, {}).get("training", {})
        if self.trained_on and training.get("fingerprint") != self.trained_on["fingerprint"]:
            raise UserError(
                f"checkpoint: was fitted on another trace set (got {self.trained_on['source']}, "
                f"not {training.get('source')}); resume with the same one"
            )
        self.trained_on = training
        self.predictor.fitted_on = training or None
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._resume(checkpoint, checkpoint.get(CHECKPOINT_KEY, {}).get(RESUME_KEY, {}))

    def _resume(self, checkpoint: dict[str, Any], record: dict[str, Any]) -> None:
        check_resumable(checkpoint, record, self._batching(), str(self.trainer.ckpt_path))
        progress = self._resumed = Progress(**record["progress"])
        self._seed, self._planned_before = record["seed"], record["planned_steps"]
        self._figures_before = record["figures"]
        restore(progress, checkpoint["loops"]["fit_loop"], self.trainer)
        keep_best(checkpoint, self.trainer)
        self.data.resume(progress.epoch, batches_to_skip(progress, self.trainer))

    def _count(self, stage: str, batch: Batch, metrics: RoutingMetrics) -> Tensor:
        logits = self.predictor(batch)
        if isinstance(self.predictor, GradientPredictor):
            self.losses.update(self.predictor.loss(logits, batch), int(batch.lengths.sum()))
        probabilities = self.predictor.probabilities(logits)
        experts = self.predictor.geometry.num_experts
        metrics.update(probabilities, batch.targets(experts), batch.mask, batch.gate_shares(experts))
        return probabilities

    def _log_metrics(self, stage: str, metrics: RoutingMetrics) -> None:
        lookaheads, layers = self.predictor.information.lookaheads, self.predictor.geometry.moe_layers
        shared = self.data.is_shared(stage)
        self.measured = metrics.rows(lookaheads, layers, over_ranks=shared)
        metrics.reset()
        figures = lookahead_figures(self.measured, stage)
        if isinstance(self.predictor, GradientPredictor):
            figures[f"{stage}/loss"] = self.losses.mean(over_ranks=shared)
            self.losses.reset()
        for name, value in figures.items():
            headline = name == f"{stage}/{HEADLINE}"
            # All ranks have the same value; their maximum is exact, their mean may be rounded.
            self.log(name, torch.tensor(value, device=self.device), prog_bar=headline, sync_dist=True, reduce_fx="max")
