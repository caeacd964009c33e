"""The folder in which a trainer saves its run."""

import os
from pathlib import Path

import lightning as L


def trainer_folder(trainer: L.Trainer) -> Path:
    """Return the folder of a run, in which Lightning puts ``checkpoints/``; all ranks must call it.

    It is the folder of the first logger, or the trainer's ``default_root_dir`` without a logger.
    """
    folder = trainer.default_root_dir
    if trainer.loggers and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or folder, str(logger.name), version)
    return Path(trainer.strategy.broadcast(folder))
