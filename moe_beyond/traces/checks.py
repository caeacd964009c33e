"""Checks of the sequences of a trace set, made when they are written and whenever they are read."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import first_wrong_entry

INFINITE_BITS, NEGATIVE_ZERO_BITS = 0x7C00, 0x8000
"""Bit patterns of float16: infinity, below which are the finite numbers from 0 up, and 0 with a minus sign."""


def first_fault(
    geometry: Geometry,
    vocab_size: int,
    offsets: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.integer[Any]],
    decode_starts: npt.NDArray[np.integer[Any]],
    experts: npt.NDArray[np.integer[Any]] | None = None,
    gate_weights: npt.NDArray[np.float16] | None = None,
) -> tuple[int, str] | None:
    """Find the first fault of some sequences, whose arrays have the right shapes.

    Args:
        geometry: The model's shape.
        vocab_size: One more than the largest token id.
        offsets: ``(rows + 1,)`` int64, the token at which each sequence begins, and the end of the last.
        token_ids: ``(tokens,)``, ids of all tokens.
        decode_starts: ``(rows,)``, the first token that the model wrote in each sequence.
        experts: ``(tokens, L, K)``, expert ids; None where they were not read.
        gate_weights: ``(tokens, L, K)`` float16; None where there are none.

    Returns:
        The row of the sequence, and what is wrong with it; None if nothing is.
    """
    lengths = np.diff(offsets)
    if (empty := lengths < 1).any():
        return int(empty.argmax()), "has no tokens"
    if (outside := (decode_starts < 0) | (decode_starts > lengths)).any():
        row = int(outside.argmax())
        return row, f"decode_start {decode_starts[row]} is not in 0..{lengths[row]}"
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        token = int(((token_ids < 0) | (token_ids >= vocab_size)).argmax())
        return _row(offsets, token), f"token id {token_ids[token]} is out of range 0..{vocab_size - 1}"
    if experts is not None:
        wrong = first_wrong_entry(experts.reshape(-1, geometry.top_k), geometry.num_experts)
        if wrong is not None:
            return _row(offsets, wrong[0] // geometry.num_layers), wrong[1]
    if gate_weights is not None:
        bits = gate_weights.reshape(len(token_ids), -1).view(np.uint16)
        if bits.max(initial=0) >= INFINITE_BITS:
            negative_or_infinite = (bits >= INFINITE_BITS) & (bits != NEGATIVE_ZERO_BITS)
            if (tokens := negative_or_infinite.any(1)).any():
                fault = "gate weights are negative or not finite; record them after the router's softmax or sigmoid"
                return _row(offsets, int(tokens.argmax())), fault
    return None


def _row(offsets: npt.NDArray[np.int64], token: int) -> int:
    return int(np.searchsorted(offsets, token, side="right")) - 1
