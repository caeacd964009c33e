"""One sequence's routing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.hidden_states import HiddenStates


@dataclass(frozen=True)
class Trace:
    """The routing decisions of one sequence.

    Attributes:
        sequence_id: Unique within its trace set.
        source: Where the text came from, such as a file name.
        token_ids: ``(T,)`` int32, ids of the model's tokenizer.
        experts: ``(T, L, K)`` uint8 (int16 where E > 255), the expert ids in router order; 255 (-1) where a slot holds
            none (`moe_beyond.traces.schema.padding_id`).
        decode_start: The first position that the model wrote itself; T if it only read.
        gate_weights: ``(T, L, K)`` float16 in the same order, or None.
        hidden_states: Those of its T tokens, where they were recorded and read.
    """

    sequence_id: str
    source: str
    token_ids: npt.NDArray[np.int32]
    experts: npt.NDArray[np.integer[Any]]
    decode_start: int
    gate_weights: npt.NDArray[np.float16] | None = None
    hidden_states: HiddenStates | None = None

    def __len__(self) -> int:
        """Tokens."""
        return len(self.token_ids)
