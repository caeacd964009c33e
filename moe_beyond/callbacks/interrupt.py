"""Ctrl-C in a fit: save a checkpoint, then stop."""

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

from moe_beyond.callbacks.trainer_folder import trainer_folder
from moe_beyond.run_folder import INTERRUPTED_CHECKPOINT


class SaveOnInterrupt(L.Callback):
    """Saves a checkpoint and stops at the first Ctrl-C (SIGINT) or SIGTERM of a fit; a second signal stops at once.

    The checkpoint ``interrupted.ckpt`` is saved after the current batch, next to the fit's other checkpoints, and
    holds the last optimiser step. A fit without a `ModelCheckpoint` saves none. With several ranks, a signal to any
    rank is enough, and a running validation ends first. Under SLURM, Lightning handles SIGTERM.

    Attributes:
        signal: Number of the received signal; None before.
        folder: Folder of the run; None before training begins.
        saved: Path of the written checkpoint; None before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.folder: Path | None = None
        self.saved: Path | None = None
        self._earlier: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers."""
        self.folder = trainer_folder(trainer)
        numbers = [signal.SIGINT] if SLURMEnvironment.detect() else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"moe-beyond: stopping after this batch; press Ctrl-C again to stop at once\n")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop after the batch if a signal was received."""
        self._stop_if_signalled(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop if a signal was received; a resumed fit starts the validation again."""
        if trainer.world_size == 1 and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_signalled(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop several ranks, which may have different numbers of validation batches."""
        if trainer.world_size > 1 and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: L.Trainer) -> None:
        signalled = self.signal is not None
        if trainer.world_size > 1:
            signalled = trainer.strategy.reduce_boolean_decision(signalled, all=False)
        if not signalled:
            return
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if callbacks and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(str(callbacks[0].dirpath)) / INTERRUPTED_CHECKPOINT
            trainer.save_checkpoint(path)
            self.saved = path
        self.signal = self.signal or signal.SIGINT
        raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the earlier signal handlers."""
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the earlier signal handlers."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}
