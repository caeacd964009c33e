"""Predictors in Lightning checkpoints."""

import pickle
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.io.folder import load_weights
from moe_beyond.predictors.registry import PACKAGE, create

CHECKPOINT_KEY = "moe_beyond"
"""Key of a checkpoint's entry that describes its predictor in JSON-serialisable values."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a fit.

    Attributes:
        predictor: Predictor, ready to score.
        training: Training record, as `PredictorTask.trained_on`.
        epoch: Finished or running epoch, from 0.
        step: Number of optimiser steps (batches, for counting predictors).
        best: File name of the fit's best checkpoint so far; None if no metric was monitored.
    """

    predictor: Predictor
    training: dict[str, Any]
    epoch: int
    step: int
    best: str | None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load the predictor of a checkpoint, whatever its architecture.

    Args:
        path: File ``.ckpt`` that a fit of this package wrote; read with ``weights_only=True``.

    Raises:
        UserError: The file is missing, is not a checkpoint, or was not written by this package.
    """
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe may never end
        raise UserError(f"{path}: is not a regular file; name a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: checkpoint not found") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, IsADirectoryError) as error:
        raise UserError(f"{path}: is not a checkpoint that can be read safely") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of this package")
    content = checkpoint[CHECKPOINT_KEY]
    predictor = create(
        content["architecture"],
        Geometry.from_json(content["geometry"]),
        content["vocab_size"],
        source=str(path),
        package=content.get("package", PACKAGE),
        **content["arguments"],
    )
    prefix = "predictor."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    load_weights(predictor, weights, str(path))
    predictor.fitted_on = content["training"]
    return Checkpoint(
        predictor.eval(), content["training"], checkpoint["epoch"], checkpoint["global_step"], _best(checkpoint)
    )


def _best(checkpoint: dict[str, Any]) -> str | None:
    """Return the file name of the best checkpoint that Lightning's `ModelCheckpoint` stored; None if there is none."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path"):
            return PurePath(state["best_model_path"]).name
    return None
