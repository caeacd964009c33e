"""Predictors in Lightning checkpoints."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.json_fields import OBJECT, check_present, whole
from moe_beyond.predictor_config import PREDICTOR, check_training
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.io.weights import build
from moe_beyond.safe_text import brief

CHECKPOINT_KEY = "moe_beyond"
"""Key of a checkpoint's entry that describes its predictor in JSON-serialisable values."""
FIELDS = {CHECKPOINT_KEY: OBJECT, "state_dict": OBJECT, "epoch": whole(0, 2**48), "global_step": whole(0, 2**48)}
"""Fields of a checkpoint that `load_checkpoint` reads."""
AGAIN = "give another checkpoint of the run"


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
        UserError: The file is missing, is damaged, is not a checkpoint, or was not written by this package.
    """
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe may never end
        raise UserError(f"{path}: is not a regular file; {AGAIN}")
    try:
        with Path(path).open("rb") as file:
            check_archive(file, path)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: checkpoint not found") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({brief(error.strerror or error)})") from error
    except UserError:
        raise
    except Exception as error:  # the archive is whole, but its pickle may hold anything
        raise UserError(f"{path}: is not a checkpoint that can be read safely") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of this package")
    content = checkpoint[CHECKPOINT_KEY]
    try:
        check_present(FIELDS, checkpoint)
        check_present(PREDICTOR, content)
        check_training(content["training"])
        weights = _weights(checkpoint["state_dict"], Path(path).stat().st_size)
    except UserError as error:
        raise UserError(f"{path}: {error}; {AGAIN}") from error
    predictor = build(content, weights, str(path), str(path))
    predictor.fitted_on = content["training"]
    return Checkpoint(predictor, content["training"], checkpoint["epoch"], checkpoint["global_step"], _best(checkpoint))


def check_archive(file: IO[bytes], path: str | Path) -> None:
    """Check that a checkpoint is as it was written; torch does not compare the check sums of its parts.

    Args:
        file: Open file, which is at its begin afterwards.
        path: Path of the file, for error messages.

    Raises:
        UserError: The file is no archive of torch, is compressed, or a part is damaged.
    """
    try:
        archive = zipfile.ZipFile(file)
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        damaged = archive.testzip() if stored else None
    except Exception as error:  # zipfile documents no exceptions for damaged archives
        raise UserError(f"{path}: is not a checkpoint that can be read safely") from error
    if not stored:
        raise UserError(f"{path}: is compressed, as no checkpoint is; {AGAIN}")
    if damaged is not None:
        raise UserError(f"{path}: is damaged (the check sum of a part differs); {AGAIN}")
    file.seek(0)


def _weights(state: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """Return the predictor's weights in a state dict, whose tensors may not need more memory than the file.

    Raises:
        UserError: A value is no tensor, or the tensors repeat stored numbers.
    """
    prefix = "predictor."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError("state_dict holds other values than tensors")
    if sum(weight.numel() * weight.element_size() for weight in weights.values()) > size:
        raise UserError("state_dict has more numbers than the file holds")
    return weights


def _best(checkpoint: dict[str, Any]) -> str | None:
    """Return the file name of the best checkpoint that Lightning's `ModelCheckpoint` stored; None if there is none."""
    for state in (checkpoint.get("callbacks") or {}).values():
        best = state.get("best_model_path") if isinstance(state, dict) and state.get("monitor") else None
        if best and isinstance(best, str):
            return PurePath(best).name
    return None
