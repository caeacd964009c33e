"""A line an epoch, where no progress bar can be drawn."""

from collections.abc import Callable

import lightning as L

SHOWN = ("train/loss", "val/recall_at_k", "val/hit_rate", "val/bytes_ratio")


class EpochLines(L.Callback):
    """Says after each epoch how the fit goes.

    Args:
        show: Called with the line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say it; validation has been there before."""
        if trainer.is_global_zero:
            found = trainer.callback_metrics
            figures = ", ".join(f"{name} {float(found[name]):.4f}" for name in SHOWN if name in found)
            self._show(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {figures or 'done'}")
