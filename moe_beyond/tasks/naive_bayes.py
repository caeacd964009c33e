"""The task of `moe_beyond.predictors.naive_bayes`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors import naive_bayes
from moe_beyond.tasks.counting import CountingTask


class NaiveBayes(CountingTask):
    """Fits a naive_bayes predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        lookaheads: Layers ahead that are scored, 1 .. this.
        sources: Routed layers that are looked at, from the last on.
        token: Weight of the token's id.
        history: Weight of the expert's own past.
        layers: Weight of each expert routed before.
        backoff: Occurrences of a token that the popularity counts for.
        min_count: Training occurrences that a token needs.
        smoothing: Occurrences of an expert that the popularity counts for.
    """

    def __init__(
        self,
        geometry: dict[str, Any],
        vocab_size: int,
        lookaheads: int = 3,
        sources: int = 3,
        token: float = 0.6,
        history: float = 0.9,
        layers: float = 0.2,
        backoff: float = 2.0,
        min_count: int = 1,
        smoothing: float = 8.0,
    ) -> None:
        predictor = naive_bayes.NaiveBayes(
            Geometry.from_json(geometry),
            vocab_size,
            lookaheads=lookaheads,
            sources=sources,
            token=token,
            history=history,
            layers=layers,
            backoff=backoff,
            min_count=min_count,
            smoothing=smoothing,
        )
        super().__init__(predictor)
