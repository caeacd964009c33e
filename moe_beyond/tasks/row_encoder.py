"""The task of `moe_beyond.predictors.row_encoder`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors import row_encoder
from moe_beyond.tasks.gradient import GradientTask


class RowEncoder(GradientTask):
    """Fits a row_encoder predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        token_width: Features of a token's embedding.
        layer_width: Features of a layer's embedding.
        width: Features of a row in the encoder.
        depth: Encoder layers.
        heads: Attention heads.
        feedforward: Features inside an encoder layer.
        context_tokens: Tokens whose rows a row sees.
        bidirectional: Whether it sees later tokens too, as the published one does.
        known_tokens: Tokens with an own vector.
        min_count: Training occurrences that an own vector needs.
        ngram_buckets: Vectors shared by all character n-grams.
        dropout: Probability of dropping a feature.
        lr: Highest learning rate.
        weight_decay: Of matrices.
        warmup: Share of all steps until the highest learning rate.
    """

    def __init__(
        self,
        geometry: dict[str, Any],
        vocab_size: int,
        token_width: int = 512,
        layer_width: int = 512,
        width: int = 512,
        depth: int = 4,
        heads: int = 8,
        feedforward: int = 2048,
        context_tokens: int = 512,
        bidirectional: bool = False,
        known_tokens: int = 16384,
        min_count: int = 2,
        ngram_buckets: int = 8192,
        dropout: float = 0.1,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
    ) -> None:
        predictor = row_encoder.RowEncoder(
            Geometry.from_json(geometry),
            vocab_size,
            token_width=token_width,
            layer_width=layer_width,
            width=width,
            depth=depth,
            heads=heads,
            feedforward=feedforward,
            context_tokens=context_tokens,
            bidirectional=bidirectional,
            known_tokens=known_tokens,
            min_count=min_count,
            ngram_buckets=ngram_buckets,
            dropout=dropout,
        )
        super().__init__(predictor, lr, weight_decay, warmup)
