"""The routing of one sequence."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.hidden_states import HiddenStates


@dataclass(frozen=True)
class Trace:
    """The routing decisions of one sequence.

    Attributes:
        sequence_id: Name of the sequence, unique within its trace set.
        source: Origin of the text, such as a file name.
        token_ids: ``(T,)`` int32, ids of the model's tokenizer.
        experts: ``(T, L, K)`` uint8 (int16 if E > 255), expert ids in router order. A top-k entry without an expert
            holds `moe_beyond.traces.schema.padding_id`: 255, or -1 in int16.
        decode_start: Number of tokens before the decode phase; T if the model generated none.
        gate_weights: ``(T, L, K)`` float16 in the order of ``experts``, or None.
        hidden_states: Hidden states of the T tokens, or None if they were not recorded or not read.
    """

    sequence_id: str
    source: str
    token_ids: npt.NDArray[np.int32]
    experts: npt.NDArray[np.integer[Any]]
    decode_start: int
    gate_weights: npt.NDArray[np.float16] | None = None
    hidden_states: HiddenStates | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids)
