"""The task that fits `moe_beyond_example.predictor.Repeats`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.tasks import CountingTask
from moe_beyond_example.predictor import Repeats


class RepeatsTask(CountingTask):
    """Fits a `Repeats` predictor.

    Args:
        geometry: Shape of the model, as a `Geometry` or its dictionary.
        vocab_size: Number of token ids of the tokenizer.
        arguments: Arguments of the predictor.
    """

    def __init__(self, geometry: Geometry | dict[str, Any], vocab_size: int, **arguments: Any) -> None:
        super().__init__(Repeats(Geometry.of(geometry), vocab_size, **arguments))
