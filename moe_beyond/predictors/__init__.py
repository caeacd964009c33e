"""Predictors: which experts a model will use next, from the information that exists before it uses them.

Example:
    >>> from moe_beyond.predictors import from_pretrained
    >>> predictor = from_pretrained("history.deepseek-v2-lite-puffin")
    >>> stepper = predictor.stepper()
    >>> stepper.observe_token(0)
    >>> stepper.scores().shape
    (26, 64)

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.predictors.architectures.cross_layer import CrossLayer as CrossLayer
    from moe_beyond.predictors.architectures.eamc import Eamc as Eamc
    from moe_beyond.predictors.architectures.history import History as History
    from moe_beyond.predictors.architectures.hybrid import Hybrid as Hybrid
    from moe_beyond.predictors.architectures.layer_mlp import LayerMlp as LayerMlp
    from moe_beyond.predictors.architectures.naive_bayes import NaiveBayes as NaiveBayes
    from moe_beyond.predictors.architectures.next_gate import NextGate as NextGate
    from moe_beyond.predictors.architectures.popularity import Popularity as Popularity
    from moe_beyond.predictors.architectures.pre_attention import PreAttention as PreAttention
    from moe_beyond.predictors.architectures.row_encoder import RowEncoder as RowEncoder
    from moe_beyond.predictors.architectures.token_causal import TokenCausal as TokenCausal
    from moe_beyond.predictors.architectures.token_table import TokenTable as TokenTable
    from moe_beyond.predictors.base import CountingPredictor as CountingPredictor
    from moe_beyond.predictors.base import GradientPredictor as GradientPredictor
    from moe_beyond.predictors.base import Predictor as Predictor
    from moe_beyond.predictors.batch import Batch as Batch
    from moe_beyond.predictors.batch import collate as collate
    from moe_beyond.predictors.calibration import Calibration as Calibration
    from moe_beyond.predictors.fit_calibration import calibrate as calibrate
    from moe_beyond.predictors.information import InformationSet as InformationSet
    from moe_beyond.predictors.io.auto import from_pretrained as from_pretrained
    from moe_beyond.predictors.io.folder import read_predictor as read_predictor
    from moe_beyond.predictors.io.folder import save_predictor as save_predictor
    from moe_beyond.predictors.online import OnlineSettings as OnlineSettings
    from moe_beyond.predictors.online import OnlineUpdates as OnlineUpdates
    from moe_beyond.predictors.registry import ARCHITECTURES as ARCHITECTURES
    from moe_beyond.predictors.registry import create as create
    from moe_beyond.predictors.registry import register as register
    from moe_beyond.predictors.saveable import check_saveable as check_saveable
    from moe_beyond.predictors.stepper import Stepper as Stepper
    from moe_beyond.predictors.stepper import TokenStepper as TokenStepper
    from moe_beyond.predictors.training_stats import TrainingStats as TrainingStats

_MODULES = {
    "ARCHITECTURES": "registry",
    "Batch": "batch",
    "Calibration": "calibration",
    "CountingPredictor": "base",
    "CrossLayer": "architectures.cross_layer",
    "Eamc": "architectures.eamc",
    "GradientPredictor": "base",
    "History": "architectures.history",
    "InformationSet": "information",
    "Hybrid": "architectures.hybrid",
    "LayerMlp": "architectures.layer_mlp",
    "NaiveBayes": "architectures.naive_bayes",
    "NextGate": "architectures.next_gate",
    "Popularity": "architectures.popularity",
    "OnlineSettings": "online",
    "OnlineUpdates": "online",
    "PreAttention": "architectures.pre_attention",
    "Predictor": "base",
    "RowEncoder": "architectures.row_encoder",
    "Stepper": "stepper",
    "TokenCausal": "architectures.token_causal",
    "TokenStepper": "stepper",
    "TokenTable": "architectures.token_table",
    "TrainingStats": "training_stats",
    "calibrate": "fit_calibration",
    "check_saveable": "saveable",
    "collate": "batch",
    "create": "registry",
    "from_pretrained": "io.auto",
    "read_predictor": "io.folder",
    "register": "registry",
    "save_predictor": "io.folder",
}
"""Public name -> module of this package."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
