"""Ctrl-C in a fit: a checkpoint first, then the end."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from moe_beyond.callbacks.run import run_folder

INTERRUPTED = "interrupted.ckpt"


class SaveOnInterrupt(L.Callback):
    """Answers the first Ctrl-C (SIGINT) or SIGTERM of a fit with a checkpoint and its end; the second ends it at once.

    The checkpoint, ``interrupted.ckpt``, is saved after the present batch, next to the fit's other checkpoints, and
    holds the last optimiser step. A fit without a `ModelCheckpoint` saves none. With several ranks, a signal to any of
    them is enough. Under SLURM, SIGTERM is left to Lightning.

    Attributes:
        signal: Number of the signal that was received; None for none.
        folder: Folder of the run, once training begins.
        saved: The checkpoint, once it is written.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.folder: Path | None = None
        self.saved: Path | None = None
        self._others: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self.folder = run_folder(trainer)
        numbers = [signal.SIGINT] if SLURMEnvironment.detect() else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():
            self._others = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"moe-beyond: stopping after this batch; once more ends at once\n")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop after the batch if a signal was received."""
        self._stop_if_signalled(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop if a signal was received; a resumed fit starts the validation again."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: L.Trainer) -> None:
        signalled = self.signal is not None
        if trainer.world_size > 1:
            signalled = trainer.strategy.reduce_boolean_decision(signalled, all=False)
        if not signalled:
            return
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if callbacks and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(str(callbacks[0].dirpath)) / INTERRUPTED
            trainer.save_checkpoint(path)
            self.saved = path
        self.signal = self.signal or signal.SIGINT
        raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen no more."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._leave()

    def _leave(self) -> None:
        for number, handler in self._others.items():
            signal.signal(number, handler)
        self._others = {}
