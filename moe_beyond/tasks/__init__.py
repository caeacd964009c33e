"""LightningModules: one base, one thin typed class per architecture; configs name these classes."""

from moe_beyond.tasks.base import PredictorTask
from moe_beyond.tasks.cross_layer import CrossLayer
from moe_beyond.tasks.eamc import Eamc
from moe_beyond.tasks.history import History
from moe_beyond.tasks.layer_mlp import LayerMlp
from moe_beyond.tasks.naive_bayes import NaiveBayes
from moe_beyond.tasks.next_gate import NextGate
from moe_beyond.tasks.popularity import Popularity
from moe_beyond.tasks.pre_attention import PreAttention
from moe_beyond.tasks.row_encoder import RowEncoder
from moe_beyond.tasks.token_causal import TokenCausal
from moe_beyond.tasks.token_table import TokenTable

__all__ = [
    "CrossLayer",
    "Eamc",
    "History",
    "LayerMlp",
    "NaiveBayes",
    "NextGate",
    "Popularity",
    "PreAttention",
    "PredictorTask",
    "RowEncoder",
    "TokenCausal",
    "TokenTable",
]
