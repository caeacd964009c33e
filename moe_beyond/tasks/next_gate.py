"""The task of `moe_beyond.predictors.architectures.next_gate`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures import next_gate
from moe_beyond.tasks.counting import CountingTask


class NextGate(CountingTask):
    """Fits a next_gate predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        hidden_size: Width of the hidden states; linked from the data.
        arguments: Of the predictor.
    """

    def __init__(self, geometry: dict[str, Any], vocab_size: int, hidden_size: int, **arguments: Any) -> None:
        super().__init__(next_gate.NextGate(Geometry.from_json(geometry), vocab_size, hidden_size, **arguments))
