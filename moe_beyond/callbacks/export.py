"""The best predictor of a fit as a folder."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_beyond.predictors.checkpoint import load_checkpoint
from moe_beyond.predictors.folder import save_predictor
from moe_beyond.tasks.base import PredictorTask


class ExportBest(L.Callback):
    """At the end of a fit, writes ``predictor/`` into the run's folder.

    It holds the checkpoint that the run's `ModelCheckpoint` found best, or the last weights where nothing was
    monitored.

    Args:
        half: Store float16 weights, half the size.
    """

    def __init__(self, half: bool = False) -> None:
        self.half = half

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictor"  # asks all ranks
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, PredictorTask)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        monitored = isinstance(trainer.checkpoint_callback, ModelCheckpoint) and trainer.checkpoint_callback.monitor
        if best and monitored:
            package(best, folder, half=self.half)
        else:
            dtype = torch.float16 if self.half else torch.float32
            save_predictor(pl_module.predictor, folder, pl_module.trained_on, dtype=dtype)


def package(checkpoint: str | Path, folder: str | Path, *, half: bool = False) -> None:
    """Make a predictor folder out of any checkpoint.

    Args:
        checkpoint: A ``.ckpt`` of this package.
        folder: The folder to write.
        half: Store float16 weights.

    Raises:
        UserError: The checkpoint cannot be read, or the folder is something else.
    """
    found = load_checkpoint(checkpoint)
    save_predictor(found.predictor, folder, found.training, dtype=torch.float16 if half else torch.float32)
