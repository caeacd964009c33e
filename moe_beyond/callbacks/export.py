"""The best predictor of a fit as a folder."""

from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from moe_beyond.callbacks.run import run_folder
from moe_beyond.errors import UserError
from moe_beyond.evaluation.runs import EXPORTED
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.calibration import Calibration, calibrate
from moe_beyond.predictors.checkpoint import load_checkpoint
from moe_beyond.predictors.folder import load_predictor, save_predictor
from moe_beyond.published import find_predictor
from moe_beyond.tasks.base import PredictorTask


class ExportBest(L.Callback):
    """At the end of a fit, writes ``predictor/`` into the run's folder.

    It holds the checkpoint that the run's `ModelCheckpoint` found best, or the last weights where nothing was
    monitored.

    Args:
        half: Store float16 weights, half the size.
        calibration: ``"validation"`` calibrates on the validation split, where there is one; a predictor (a folder, a
            published name, or ``hf:ORG/REPO``) lends its calibration, for a fit that leaves nothing to validate on;
            None does neither.

    Attributes:
        exported: The folder, once it is written.
    """

    def __init__(self, half: bool = False, calibration: str | None = "validation") -> None:
        self.half, self.calibration = half, calibration
        self._lent: Calibration | None = None
        self.exported: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a calibration that does not fit before hours are spent."""
        assert isinstance(pl_module, PredictorTask)
        self.exported = None
        if stage == "fit" and self.calibration not in (None, "validation"):
            self._lent = _lent(str(self.calibration), pl_module.predictor)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export what was fitted; nothing where no step was made."""
        folder = export_folder(trainer)  # asks all ranks
        if not trainer.global_step or not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, PredictorTask)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        monitored = isinstance(trainer.checkpoint_callback, ModelCheckpoint) and trainer.checkpoint_callback.monitor
        predictor, training = pl_module.predictor, pl_module.trained_on
        if best and monitored:
            found = load_checkpoint(best)
            predictor, training = found.predictor, found.training
        predictor.calibration = self._lent
        if self.calibration == "validation" and pl_module.data.val_split is not None:
            was_training = predictor.training
            predictor.eval()
            batches = cast("DataLoader[Batch]", pl_module.data.val_dataloader())
            predictor.calibration = calibrate(predictor.to(pl_module.device), (b.to(pl_module.device) for b in batches))
            predictor.train(was_training)
        save_predictor(predictor, folder, training, dtype=torch.float16 if self.half else torch.float32)
        self.exported = folder


def export_folder(trainer: L.Trainer) -> Path:
    """Return where `ExportBest` writes the predictor of a run; all ranks must ask."""
    return run_folder(trainer) / EXPORTED


def _lent(name: str, predictor: Predictor) -> Calibration:
    """Return the calibration of another predictor."""
    lender = load_predictor(find_predictor(name))
    kinds = [(p.architecture, p.link, p.information, p.geometry.shape()) for p in (lender, predictor)]
    if lender.calibration is None or kinds[0] != kinds[1]:
        raise UserError(f"{name}: has no calibration that fits a {predictor.architecture} of this model")
    return lender.calibration


def package(checkpoint: str | Path, folder: str | Path, *, half: bool = False) -> None:
    """Make a predictor folder out of any checkpoint, not calibrated.

    Args:
        checkpoint: A ``.ckpt`` of this package.
        folder: The folder to write.
        half: Store float16 weights.

    Raises:
        UserError: The checkpoint cannot be read, or the folder is something else.
    """
    found = load_checkpoint(checkpoint)
    save_predictor(found.predictor, folder, found.training, dtype=torch.float16 if half else torch.float32)
