"""The task of `moe_beyond.predictors.cross_layer`."""

from typing import Any, Literal

from moe_beyond.geometry import Geometry
from moe_beyond.predictors import cross_layer
from moe_beyond.tasks.gradient import GradientTask


class CrossLayer(GradientTask):
    """Fits a cross_layer predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        lookaheads: Layers ahead that are scored, 1 .. this.
        width: Features of a token's state.
        depth: Transformer blocks over tokens.
        heads: Attention heads.
        window: Tokens a block sees back.
        copies: Heads that pick earlier tokens.
        objective: What is fitted, ``"softmax"`` or ``"subset"``.
        layer_width: Features of the recurrent state over layers.
        layer_copies: Heads that pick earlier tokens after every layer.
        known_tokens: Tokens with an own vector.
        min_count: Training occurrences that an own vector needs.
        ngram_buckets: Vectors shared by all character n-grams.
        dropout: Probability of dropping a feature.
        token_dropout: Probability of treating a token as unknown.
        lr: Highest learning rate.
        weight_decay: Of matrices.
        warmup: Share of all steps until the highest learning rate.
    """

    def __init__(
        self,
        geometry: dict[str, Any],
        vocab_size: int,
        lookaheads: int = 3,
        width: int = 256,
        depth: int = 3,
        heads: int = 8,
        window: int = 128,
        copies: int = 0,
        objective: Literal["softmax", "subset"] = "softmax",
        layer_width: int = 256,
        layer_copies: int = 0,
        known_tokens: int = 16384,
        min_count: int = 2,
        ngram_buckets: int = 8192,
        dropout: float = 0.15,
        token_dropout: float = 0.1,
        lr: float = 1.5e-3,
        weight_decay: float = 0.03,
        warmup: float = 0.05,
    ) -> None:
        predictor = cross_layer.CrossLayer(
            Geometry.from_json(geometry),
            vocab_size,
            lookaheads=lookaheads,
            width=width,
            depth=depth,
            heads=heads,
            window=window,
            copies=copies,
            objective=objective,
            layer_width=layer_width,
            layer_copies=layer_copies,
            known_tokens=known_tokens,
            min_count=min_count,
            ngram_buckets=ngram_buckets,
            dropout=dropout,
            token_dropout=token_dropout,
        )
        super().__init__(predictor, lr, weight_decay, warmup)
