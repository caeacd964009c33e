"""Tokens that an engine marks as missing, with -1 in place of all their experts.

Engines do so for the cached beginning of a prompt, which is not computed again, and for padded rows. Missing tokens at
either end of a request are omitted, with their token ids and gate weights. Missing tokens in the middle are an error,
because a trace has every token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError


def recorded_span(ids: npt.NDArray[Any], layers: Sequence[int], num_experts: int, location: str) -> slice:
    """Return the range of recorded tokens, without missing tokens at both ends; empty if no token was recorded.

    Args:
        ids: ``(T, L, K)`` whole numbers. In an unsigned array, -1 is its largest value, unless that is an expert id.
        layers: Index in the model of each of the L layers, for error messages.
        num_experts: Experts per layer, E.
        location: Path of the recording, for error messages.

    Raises:
        UserError: A token is missing between others, or in only some layers.
    """
    marker = -1
    if ids.dtype.kind == "u" and (marker := int(np.iinfo(ids.dtype).max)) < num_experts:
        return slice(0, len(ids))
    marked = (ids == marker).all(axis=2)
    missing = marked.all(axis=1)
    recorded = np.flatnonzero(~missing)
    if len(recorded) == 0:
        return slice(0, 0)
    span = slice(int(recorded[0]), int(recorded[-1]) + 1)
    if len(inside := np.argwhere(marked[span])):
        token, row = int(inside[0][0]) + span.start, int(inside[0][1])
        if missing[token]:
            raise UserError(
                f"{location}: token {token} is marked as missing ({marker}) between recorded tokens; record the "
                "request again, or cut the file there"
            )
        raise UserError(
            f"{location}: token {token} is marked as missing ({marker}) in layer {layers[row]}, but not in "
            "all layers; record the request again"
        )
    return span


def notes(tokens: int, requests: int) -> str:
    """Return a note on omitted tokens and requests for the source of a manifest; empty if there are none.

    Args:
        tokens: Number of omitted tokens.
        requests: Number of omitted requests.

    Example:
        >>> notes(3, 1)
        '; 3 tokens omitted, marked as missing (-1); 1 request without recorded tokens omitted'
    """
    omitted = f"; {_counted(tokens, 'token')} omitted, marked as missing (-1)" if tokens else ""
    return omitted + (f"; {_counted(requests, 'request')} without recorded tokens omitted" if requests else "")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
