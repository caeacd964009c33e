"""Predictor folders made from checkpoints and runs."""

from pathlib import Path

import torch

from moe_beyond.evaluation.checkpoints import find_trained, load_trained
from moe_beyond.files import check_is_free
from moe_beyond.predictors.io.folder import save_predictor


def package(checkpoint: str | Path, folder: str | Path, *, half: bool = False) -> None:
    """Convert a checkpoint, without calibration, or a run into a predictor folder.

    Args:
        checkpoint: A ``.ckpt`` file of this package, or the folder of a run
            (`moe_beyond.evaluation.checkpoints.find_trained`).
        folder: The new predictor folder; it must not exist, unless it is empty.
        half: Whether to store float16 weights (default: False).

    Raises:
        UserError: The checkpoint cannot be read, or the folder exists.
    """
    folder, source = Path(folder), Path(checkpoint)
    check_is_free(folder)
    predictor, training = load_trained(find_trained(str(checkpoint)) if source.is_dir() else source)
    save_predictor(predictor, folder, training, dtype=torch.float16 if half else torch.float32)
