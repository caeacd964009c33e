"""One line per epoch, where no progress bar can be drawn."""

from collections.abc import Callable

import lightning as L


class EpochLines(L.Callback):
    """Shows after each epoch the figures that a progress bar would.

    Args:
        show: Called with the line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the line; the epoch's validation ran before."""
        if trainer.is_global_zero:
            shown = sorted(trainer.progress_bar_metrics.items())
            figures = ", ".join(f"{name} {float(value):.4f}" for name, value in shown)
            self._show(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {figures or 'done'}")
