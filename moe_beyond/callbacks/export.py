"""The best predictor of a fit as a folder."""

from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from moe_beyond.callbacks.run import run_folder
from moe_beyond.errors import UserError
from moe_beyond.evaluation.checkpoints import EXPORTED, find_trained, load_trained
from moe_beyond.files import check_is_free
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.fit_calibration import calibrate
from moe_beyond.predictors.io.checkpoint import load_checkpoint
from moe_beyond.predictors.io.folder import read_predictor, save_predictor
from moe_beyond.predictors.training_text import calibration_texts, record_uses
from moe_beyond.pretrained import find_predictor
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
        self._lender: Predictor | None = None
        self.exported: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a calibration that does not fit before hours are spent."""
        assert isinstance(pl_module, PredictorTask)
        self.exported = None
        if stage == "fit" and self.calibration not in (None, "validation"):
            self._lender = _lender(str(self.calibration), pl_module.predictor)
            self._lent = self._lender.calibration

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
        calibrated = self.calibration == "validation" and pl_module.data.val_split is not None
        if calibrated:
            was_training = predictor.training
            predictor.eval()
            batches = cast("DataLoader[Batch]", pl_module.data.val_dataloader())
            predictor.calibration = calibrate(predictor.to(pl_module.device), (b.to(pl_module.device) for b in batches))
            predictor.train(was_training)
        uses = ["chose the epoch of"] * bool(best and monitored) + ["calibrated"] * calibrated
        training = record_uses(training, uses, [] if self._lender is None else calibration_texts(self._lender))
        save_predictor(predictor, folder, training, dtype=torch.float16 if self.half else torch.float32)
        self.exported = folder


def export_folder(trainer: L.Trainer) -> Path:
    """Return where `ExportBest` writes the predictor of a run; all ranks must ask."""
    return run_folder(trainer) / EXPORTED


def _lender(name: str, predictor: Predictor) -> Predictor:
    """Load another predictor, whose calibration must fit."""
    lender = read_predictor(find_predictor(name))
    kinds = [(p.architecture, p.activation, p.information, p.geometry.shape()) for p in (lender, predictor)]
    if lender.calibration is None or kinds[0] != kinds[1]:
        raise UserError(f"{name}: has no calibration that fits a {predictor.architecture} of this model")
    return lender


def package(checkpoint: str | Path, folder: str | Path, *, half: bool = False) -> None:
    """Make a predictor folder out of a checkpoint, without calibration, or out of a run.

    Args:
        checkpoint: A ``.ckpt`` of this package, or a run's folder (`moe_beyond.evaluation.checkpoints.find_trained`).
        folder: The folder to write; it must not exist, unless it is empty.
        half: Store float16 weights.

    Raises:
        UserError: The checkpoint cannot be read, or the folder exists.
    """
    folder, source = Path(folder), Path(checkpoint)
    check_is_free(folder)
    predictor, training = load_trained(find_trained(str(checkpoint)) if source.is_dir() else source)
    save_predictor(predictor, folder, training, dtype=torch.float16 if half else torch.float32)
