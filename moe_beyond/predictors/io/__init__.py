"""Predictors on disk: predictor folders, their cards, and checkpoints."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.predictors.io.auto import from_pretrained as from_pretrained
    from moe_beyond.predictors.io.card import record_figures as record_figures
    from moe_beyond.predictors.io.checkpoint import Checkpoint as Checkpoint
    from moe_beyond.predictors.io.checkpoint import load_checkpoint as load_checkpoint
    from moe_beyond.predictors.io.folder import check_fits as check_fits
    from moe_beyond.predictors.io.folder import read_config as read_config
    from moe_beyond.predictors.io.folder import read_predictor as read_predictor
    from moe_beyond.predictors.io.folder import save_predictor as save_predictor

_MODULES = {
    "Checkpoint": "checkpoint",
    "check_fits": "folder",
    "from_pretrained": "auto",
    "load_checkpoint": "checkpoint",
    "read_config": "folder",
    "read_predictor": "folder",
    "record_figures": "card",
    "save_predictor": "folder",
}
"""Public name -> module of this package."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
