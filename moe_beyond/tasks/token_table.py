"""The task of `moe_beyond.predictors.token_table`."""

from typing import Any

from moe_beyond.geometry import Geometry
from moe_beyond.predictors import token_table
from moe_beyond.tasks.counting import CountingTask


class TokenTable(CountingTask):
    """Fits a token_table predictor.

    Args:
        geometry: The model's shape as `Geometry.to_json` gives it; linked from the data.
        vocab_size: Ids of the tokenizer; linked from the data.
        backoff: Occurrences that a layer's popularity counts for.
        min_count: Training occurrences that a row of a token's own needs.
    """

    def __init__(self, geometry: dict[str, Any], vocab_size: int, backoff: float = 2.0, min_count: int = 1) -> None:
        super().__init__(token_table.TokenTable(Geometry.from_json(geometry), vocab_size, backoff, min_count))
