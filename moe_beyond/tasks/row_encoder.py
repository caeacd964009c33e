"""The task of `moe_beyond.predictors.architectures.row_encoder`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures import row_encoder
from moe_beyond.tasks.gradient import GradientTask


class RowEncoder(GradientTask):
    """Fits a row_encoder predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        lr: Highest learning rate.
        weight_decay: Of matrices.
        warmup: Share of all steps until the highest learning rate.
        compiled: Whether the objective is compiled.
        teachers: Predictor folders to learn from, besides the data.
        arguments: Of the predictor.
    """

    def __init__(
        self,
        geometry: dict[str, Any],
        vocab_size: int,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        compiled: bool = False,
        teachers: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        predictor = row_encoder.RowEncoder(Geometry.from_json(geometry), vocab_size, **arguments)
        super().__init__(predictor, lr, weight_decay, warmup, compiled, teachers)
