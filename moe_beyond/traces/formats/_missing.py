"""Tokens that an engine marks as missing: -1 in place of all their experts.

Engines do so where a prompt's beginning was cached and not computed again, and where rows are padded. What is missing
at the beginning or at the end of a request is left out, with its token ids and its gate weights; in the middle it is
refused, since a trace has every token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError


def recorded_span(ids: npt.NDArray[Any], layers: Sequence[int], num_experts: int, where: str) -> slice:
    """Return which tokens were recorded: all but the missing ones at both ends; an empty slice where none was.

    Args:
        ids: ``(T, L, K)`` whole numbers.
        layers: The model's layer of each of the L, for error messages.
        num_experts: E; in an unsigned array its largest value is what -1 becomes, unless that is an expert.
        where: The recording, for error messages.

    Raises:
        UserError: A token is missing between others, or in some of its layers.
    """
    marker = -1
    if ids.dtype.kind == "u" and (marker := int(np.iinfo(ids.dtype).max)) < num_experts:
        return slice(0, len(ids))
    marked = (ids == marker).all(axis=2)
    missing = marked.all(axis=1)
    there = np.flatnonzero(~missing)
    if len(there) == 0:
        return slice(0, 0)
    span = slice(int(there[0]), int(there[-1]) + 1)
    if len(inside := np.argwhere(marked[span])):
        token, row = int(inside[0][0]) + span.start, int(inside[0][1])
        if missing[token]:
            raise UserError(
                f"{where}: token {token} is marked as missing ({marker}) between tokens that are not; record the "
                "request again, or cut the file there"
            )
        raise UserError(
            f"{where}: token {token} is marked as missing ({marker}) in layer {layers[row]}, and not in all its layers"
        )
    return span


def notes(tokens: int, requests: int) -> str:
    """Say what was left out, as the source in a manifest does; nothing where nothing was.

    Example:
        >>> notes(3, 1)
        '; 3 tokens left out, marked as missing (-1); 1 request without recorded tokens passed over'
    """
    left_out = f"; {_counted(tokens, 'token')} left out, marked as missing (-1)" if tokens else ""
    return left_out + (f"; {_counted(requests, 'request')} without recorded tokens passed over" if requests else "")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
