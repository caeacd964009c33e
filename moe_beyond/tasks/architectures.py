"""The tasks of this package, one per architecture: each builds a predictor from its arguments and fits it.

`moe-beyond fit` reads the parameters of these classes, and those of the predictors behind ``**arguments``.
"""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures import (
    cross_layer,
    eamc,
    history,
    hybrid,
    layer_mlp,
    naive_bayes,
    next_gate,
    popularity,
    pre_attention,
    row_encoder,
    token_causal,
    token_table,
)
from moe_beyond.tasks.adamw import AdamWSettings
from moe_beyond.tasks.counting import CountingTask
from moe_beyond.tasks.gradient import GradientTask

SLOW = AdamWSettings(lr=1e-4, weight_decay=0.01)
MEDIUM = AdamWSettings(lr=1e-3)
FAST = AdamWSettings(lr=1.5e-3)


class PopularityTask(CountingTask):
    """Fits a `moe_beyond.predictors.architectures.popularity.Popularity`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        **arguments: Any,
    ) -> None:
        predictor = popularity.Popularity(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor)


class TokenTableTask(CountingTask):
    """Fits a `moe_beyond.predictors.architectures.token_table.TokenTable`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        **arguments: Any,
    ) -> None:
        predictor = token_table.TokenTable(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor)


class EamcTask(CountingTask):
    """Fits a `moe_beyond.predictors.architectures.eamc.Eamc`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        **arguments: Any,
    ) -> None:
        predictor = eamc.Eamc(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor)


class HistoryTask(CountingTask):
    """Fits a `moe_beyond.predictors.architectures.history.History`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        **arguments: Any,
    ) -> None:
        predictor = history.History(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor)


class NaiveBayesTask(CountingTask):
    """Fits a `moe_beyond.predictors.architectures.naive_bayes.NaiveBayes`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        **arguments: Any,
    ) -> None:
        predictor = naive_bayes.NaiveBayes(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor)


class RowEncoderTask(GradientTask):
    """Fits a `moe_beyond.predictors.architectures.row_encoder.RowEncoder`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        optimizer: Settings of the optimiser.
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        optimizer: AdamWSettings = SLOW,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = row_encoder.RowEncoder(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor, optimizer, compiled, teachers)


class TokenCausalTask(GradientTask):
    """Fits a `moe_beyond.predictors.architectures.token_causal.TokenCausal`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        optimizer: Settings of the optimiser.
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        optimizer: AdamWSettings = FAST,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = token_causal.TokenCausal(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor, optimizer, compiled, teachers)


class CrossLayerTask(GradientTask):
    """Fits a `moe_beyond.predictors.architectures.cross_layer.CrossLayer`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        optimizer: Settings of the optimiser.
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        optimizer: AdamWSettings = FAST,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = cross_layer.CrossLayer(Geometry.of(geometry), vocab_size, **arguments)
        super().__init__(predictor, optimizer, compiled, teachers)


class HybridTask(GradientTask):
    """Fits a `moe_beyond.predictors.architectures.hybrid.Hybrid`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the hidden states.
        optimizer: Settings of the optimiser.
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        hidden_size: int,
        optimizer: AdamWSettings = FAST,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = hybrid.Hybrid(Geometry.of(geometry), vocab_size, hidden_size, **arguments)
        super().__init__(predictor, optimizer, compiled, teachers)


class NextGateTask(CountingTask):
    """Fits a `moe_beyond.predictors.architectures.next_gate.NextGate`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the hidden states.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        hidden_size: int,
        **arguments: Any,
    ) -> None:
        predictor = next_gate.NextGate(Geometry.of(geometry), vocab_size, hidden_size, **arguments)
        super().__init__(predictor)


class LayerMlpTask(GradientTask):
    """Fits a `moe_beyond.predictors.architectures.layer_mlp.LayerMlp`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the hidden states.
        optimizer: Settings of the optimiser.
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        hidden_size: int,
        optimizer: AdamWSettings = MEDIUM,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = layer_mlp.LayerMlp(Geometry.of(geometry), vocab_size, hidden_size, **arguments)
        super().__init__(predictor, optimizer, compiled, teachers)


class PreAttentionTask(GradientTask):
    """Fits a `moe_beyond.predictors.architectures.pre_attention.PreAttention`.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the hidden states.
        optimizer: Settings of the optimiser.
        compiled: Whether to compile the objective; compiling takes half a minute and a C++ compiler (default: False).
        teachers: Predictors to learn from, in addition to the data: folders, pretrained names or ``hf:ORG/REPO``.
        arguments: Arguments of the predictor.
    """

    def __init__(
        self,
        geometry: Geometry | dict[str, Any],
        vocab_size: int,
        hidden_size: int,
        optimizer: AdamWSettings = MEDIUM,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = pre_attention.PreAttention(Geometry.of(geometry), vocab_size, hidden_size, **arguments)
        super().__init__(predictor, optimizer, compiled, teachers)
