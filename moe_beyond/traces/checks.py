"""Checks of sequences, made when a trace set is written and whenever it is read."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.traces.schema import first_invalid_entry

INFINITE_BITS, NEGATIVE_ZERO_BITS = 0x7C00, 0x8000
"""Bit patterns of float16: infinity, which follows all finite numbers from 0 up, and minus 0."""


def first_fault(
    geometry: Geometry,
    vocab_size: int,
    offsets: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.integer[Any]],
    decode_starts: npt.NDArray[np.integer[Any]],
    experts: npt.NDArray[np.integer[Any]] | None = None,
    gate_weights: npt.NDArray[np.float16] | None = None,
) -> tuple[int, str] | None:
    """Find the first invalid sequence.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids, all of which are smaller.
        offsets: ``(rows + 1,)`` int64, first token of each sequence, and the end of the last.
        token_ids: ``(tokens,)``, ids of all tokens.
        decode_starts: ``(rows,)``, number of tokens before the decode phase of each sequence.
        experts: ``(tokens, L, K)``, expert ids (default: they are not checked).
        gate_weights: ``(tokens, L, K)`` float16 (default: they are not checked).

    Returns:
        Row of the sequence and a description of the fault; None if all sequences are valid.
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
        invalid = first_invalid_entry(experts.reshape(-1, geometry.top_k), geometry.num_experts)
        if invalid is not None:
            return _row(offsets, invalid[0] // geometry.num_layers), invalid[1]
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
