"""Predictor architectures, one per file."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.predictors.architectures._hidden_states import HiddenStatePredictor as HiddenStatePredictor
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

_MODULES = {
    "CrossLayer": "cross_layer",
    "Eamc": "eamc",
    "HiddenStatePredictor": "_hidden_states",
    "History": "history",
    "Hybrid": "hybrid",
    "LayerMlp": "layer_mlp",
    "NaiveBayes": "naive_bayes",
    "NextGate": "next_gate",
    "Popularity": "popularity",
    "PreAttention": "pre_attention",
    "RowEncoder": "row_encoder",
    "TokenCausal": "token_causal",
    "TokenTable": "token_table",
}
"""Public name -> module of this package."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
