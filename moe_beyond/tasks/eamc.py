"""The task of `moe_beyond.predictors.architectures.eamc`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures import eamc
from moe_beyond.tasks.counting import CountingTask


class Eamc(CountingTask):
    """Fits an eamc predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        arguments: Of the predictor.
    """

    def __init__(self, geometry: dict[str, Any], vocab_size: int, **arguments: Any) -> None:
        super().__init__(eamc.Eamc(Geometry.from_json(geometry), vocab_size, **arguments))
