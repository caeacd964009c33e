"""Predictors out of Lightning's checkpoints."""

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
"""Where a checkpoint says what its weights are, in plain values."""


@dataclass(frozen=True)
class Checkpoint:
    """What a fit had at some moment.

    Attributes:
        predictor: Ready to score.
        training: Record of its training text, as `PredictorTask.trained_on`.
        epoch: Finished or running epoch, from 0.
        step: Optimiser steps done (batches, for counting predictors).
        best: File name of the best checkpoint of the fit so far; None where nothing was monitored.
    """

    predictor: Predictor
    training: dict[str, Any]
    epoch: int
    step: int
    best: str | None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load the predictor of a checkpoint, whichever its architecture.

    Args:
        path: A ``.ckpt`` that a fit of this package wrote; read with ``weights_only=True``.

    Raises:
        UserError: The file is missing, is no checkpoint, or is not of this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: checkpoint not found") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, IsADirectoryError) as error:
        raise UserError(f"{path}: is not a checkpoint that can be read safely") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of this package")
    told = checkpoint[CHECKPOINT_KEY]
    geometry = Geometry.from_json(told["geometry"])
    predictor = create(
        told["architecture"],
        geometry,
        told["vocab_size"],
        source=str(path),
        package=told.get("package", PACKAGE),
        **told["arguments"],
    )
    prefix = "predictor."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    load_weights(predictor, weights, str(path))
    predictor.fitted_on = told["training"]
    return Checkpoint(
        predictor.eval(), told["training"], checkpoint["epoch"], checkpoint["global_step"], _best(checkpoint)
    )


def _best(checkpoint: dict[str, Any]) -> str | None:
    """Return the name of the best checkpoint's file, as Lightning's `ModelCheckpoint` notes it."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path"):
            return PurePath(state["best_model_path"]).name
    return None
