"""The best predictor of a fit, exported as a folder."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_beyond.callbacks.trainer_folder import trainer_folder
from moe_beyond.errors import UserError
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.fit_calibration import calibrate
from moe_beyond.predictors.io.checkpoint import load_checkpoint
from moe_beyond.predictors.io.folder import read_predictor, save_predictor
from moe_beyond.predictors.training_text import calibration_texts, record_uses
from moe_beyond.pretrained import find_predictor
from moe_beyond.run_folder import PREDICTOR_FOLDER
from moe_beyond.tasks.base import PredictorTask


class ExportBest(L.Callback):
    """Writes the predictor folder ``predictor/`` into the folder of the run at the end of a fit.

    It holds the best checkpoint of the run's `ModelCheckpoint`, or the last weights if nothing is monitored.

    Args:
        half: Whether to store float16 weights, half the size (default: False).
        calibration: ``"validation"`` fits the calibration on the validation split, if there is one (default). The name
            of a predictor (a folder, a pretrained name or ``hf:ORG/REPO``) copies its calibration, for a fit without
            validation. None leaves the predictor uncalibrated.

    Attributes:
        exported: Path of the written folder; None before.
    """

    def __init__(self, half: bool = False, calibration: str | None = "validation") -> None:
        self.half, self.calibration = half, calibration
        self._calibration: Calibration | None = None
        self._calibrated: Predictor | None = None
        self.exported: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the calibration before the fit.

        Raises:
            UserError: There is no such predictor, or its calibration does not fit.
        """
        assert isinstance(pl_module, PredictorTask)
        self.exported = None
        if stage == "fit" and self.calibration not in (None, "validation"):
            self._calibrated = _calibrated_predictor(str(self.calibration), pl_module.predictor)
            self._calibration = self._calibrated.calibration

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the predictor, unless no step was made."""
        folder = export_folder(trainer)  # all ranks take part
        if not trainer.global_step or not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, PredictorTask)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        monitored = isinstance(trainer.checkpoint_callback, ModelCheckpoint) and trainer.checkpoint_callback.monitor
        predictor, training = pl_module.predictor, pl_module.trained_on
        if best and monitored:
            checkpoint = load_checkpoint(best)
            predictor, training = checkpoint.predictor, checkpoint.training
        predictor.calibration = self._calibration
        calibrated = self.calibration == "validation" and pl_module.data.val_split is not None
        if calibrated:
            was_training = predictor.training
            predictor.eval()
            batches = pl_module.data.whole_validation()
            tokens = sum(shard.tokens for shard in pl_module.data.val_traces.shards(pl_module.data.val_split))
            moved = (batch.to(pl_module.device) for batch in batches)
            predictor.calibration = calibrate(predictor.to(pl_module.device), moved, tokens)
            predictor.train(was_training)
        uses = ["chose the epoch of"] * bool(best and monitored) + ["calibrated"] * calibrated
        training = record_uses(training, uses, [] if self._calibrated is None else calibration_texts(self._calibrated))
        save_predictor(predictor, folder, training, dtype=torch.float16 if self.half else torch.float32)
        self.exported = folder


def export_folder(trainer: L.Trainer) -> Path:
    """Return the folder that `ExportBest` writes; all ranks must call it."""
    return trainer_folder(trainer) / PREDICTOR_FOLDER


def _calibrated_predictor(name: str, predictor: Predictor) -> Predictor:
    """Load the predictor whose calibration is copied.

    Raises:
        UserError: Its calibration is missing or is for another kind of predictor.
    """
    other = read_predictor(find_predictor(name))
    kinds = [(p.architecture, p.activation, p.information, p.geometry.shape()) for p in (other, predictor)]
    if other.calibration is None or kinds[0] != kinds[1]:
        raise UserError(f"{name}: has no calibration that fits a {predictor.architecture} of this model")
    return other
