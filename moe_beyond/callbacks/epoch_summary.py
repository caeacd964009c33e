"""One line per epoch, for terminals and pipes without a progress bar."""

from collections.abc import Callable

import lightning as L


def progress_bar_figures(trainer: L.Trainer) -> str:
    """Return the figures of the progress bar as text."""
    return ", ".join(f"{name} {float(value):.4f}" for name, value in sorted(trainer.progress_bar_metrics.items()))


class EpochSummary(L.Callback):
    """Prints one line after each training epoch and its validation.

    Args:
        show: Function that prints a line.
        describe: Function that returns the figures as text (default: those of the progress bar).
    """

    def __init__(
        self, show: Callable[[str], None], describe: Callable[[L.Trainer], str] = progress_bar_figures
    ) -> None:
        self._show, self._describe = show, describe

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line; Lightning has validated by now."""
        if trainer.is_global_zero:
            figures = self._describe(trainer)
            self._show(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {figures or 'done'}")
