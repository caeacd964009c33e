"""Atomic checkpoints: each is written next to its target, flushed to disk, then renamed.

Lightning writes through fsspec into the folder for temporary files. If that is another file system, the checkpoint is
then copied over the earlier one, and a kill or a full disk during the copy destroys both.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO

from moe_beyond.files import replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints so that a path always holds a complete one, the earlier or the later.

    Every task installs it for a fit, unless the trainer has another plugin of this kind. Other modules can use
    ``L.Trainer(plugins=[WholeCheckpointIO()])``. Remote paths are written as Lightning writes them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Plain values and tensors.
            path: Path of the checkpoint.
            storage_options: Options of a remote file system, which Lightning's own writer refuses (default: None).

        Raises:
            UserError: The disk is full.
        """
        if storage_options is not None or get_protocol(str(path)) != "file":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch fails again when it closes its archive
                cause = error.__context__
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or error from None


def keep_checkpoints_whole(trainer: L.Trainer) -> None:
    """Install `WholeCheckpointIO` in a trainer, unless it has another plugin of this kind."""
    if trainer.strategy._checkpoint_io is None:  # noqa: SLF001  (the property would create Lightning's own)
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
