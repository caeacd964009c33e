"""Checkpoints that are never half-written: each is written next to its target, flushed to the disk, then renamed.

Lightning writes through fsspec, into the folder for temporary files. Where that is another file system, the checkpoint
is then copied over the one before it, and a kill or a full disk meanwhile destroys both.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO

from moe_beyond.files import replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints so that a path always holds a whole one, the earlier or the later.

    Every task sets it up for a fit whose trainer was given no plugin of this kind. Others can ask for it by
    ``L.Trainer(plugins=[WholeCheckpointIO()])``. Remote paths are written as Lightning does.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Plain values and tensors.
            path: Path of the checkpoint.
            storage_options: Options of a remote file system, which Lightning's own writer refuses.

        Raises:
            UserError: There is no room for it.
        """
        if storage_options is not None or get_protocol(str(path)) != "file":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch closes its archive, and fails at that too
                cause = error.__context__
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or error from None


def keep_checkpoints_whole(trainer: L.Trainer) -> None:
    """Let a trainer write checkpoints so, unless it was given a plugin that writes them otherwise."""
    if trainer.strategy._checkpoint_io is None:  # noqa: SLF001  (its property would make Lightning's own)
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
