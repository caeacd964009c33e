"""Sidecars: files next to a recorded sequence, with its token ids or the start of its decode phase.

``NAME.tokens`` holds one id per token. Engines return one more id, that of the last sampled token, which no layer has
processed. ``NAME.decode_start`` is one number: the tokens that the model read before it generated any.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.traces.formats._arrays import StoredArray, stored_array

TOKENS, DECODE_START = ".tokens", ".decode_start"
FIELDS = (
    "NAME.tokens.npy next to it: token ids, one whole number per token (T, or T + 1 with the last sampled); optional",
    "NAME.decode_start.npy next to it: one whole number, the index of the first generated token; optional",
)
"""Description of the sidecars in help."""


def find_sidecar(path: Path, ending: str) -> StoredArray | None:
    """Return a sidecar of a file, such as ``NAME.tokens.npy`` of ``NAME.csv``; None if there is none.

    Args:
        path: Path of the recorded file.
        ending: `TOKENS` or `DECODE_START`.

    Raises:
        UserError: The sidecar is not an array of whole numbers.
    """
    sidecar = path.with_name(f"{path.stem}{ending}.npy")
    return stored_array(sidecar) if sidecar.exists() else None


def read_token_ids(stored: StoredArray | None, length: int, span: slice) -> npt.NDArray[np.int32]:
    """Return the token ids of the recorded tokens; zeros if there is no sidecar.

    Args:
        stored: Sidecar with the ids of all tokens of the request, or None.
        length: Tokens of the request, T.
        span: Range of the recorded tokens.

    Raises:
        UserError: The number of ids is wrong, or an id is.
    """
    if stored is None:
        return np.zeros(span.stop - span.start, np.int32)
    if stored.shape not in ((length,), (length + 1,)):
        raise UserError(
            f"{stored.location}: must have shape ({length},), one id per recorded token (got {stored.shape})"
        )
    ids: npt.NDArray[Any] = stored.read()[:length]
    if len(outside := ids[(ids < 0) | (ids > np.iinfo(np.int32).max)]):
        raise UserError(f"{stored.location}: a token id must be in 0..{np.iinfo(np.int32).max} (got {outside[0]})")
    return ids[span].astype(np.int32)


def by_file(
    tokens: Mapping[str, StoredArray | None], ids: Mapping[str, npt.NDArray[np.int32]]
) -> dict[str, npt.NDArray[np.int32]] | None:
    """Return file -> token ids, for the check of a `Recording`; None if there are no files.

    Args:
        tokens: Name of the sequence -> sidecar of its token ids, or None.
        ids: Name of the sequence -> its token ids.
    """
    return {stored.location: ids[name] for name, stored in tokens.items() if stored is not None and name in ids} or None


def read_decode_start(stored: StoredArray | None, length: int, span: slice) -> int:
    """Return the ``decode_start`` of the recorded tokens: their number, as for a prompt, if there is no sidecar.

    Args:
        stored: Sidecar with the ``decode_start`` of the request, or None.
        length: Tokens of the request, T.
        span: Range of the recorded tokens.

    Raises:
        UserError: The value is not one number in 0..T.
    """
    recorded: int = span.stop - span.start
    if stored is None:
        return recorded
    if stored.shape != ():
        raise UserError(f"{stored.location}: decode_start must be one number (got shape {stored.shape})")
    if not 0 <= (start := int(stored.read())) <= length:
        raise UserError(f"{stored.location}: decode_start must be in 0..{length} (got {start})")
    return min(max(start - int(span.start), 0), recorded)


def author_of(starts: Sequence[int], lengths: Sequence[int]) -> str:
    """Return the author of the text, as in a manifest.

    Args:
        starts: ``decode_start`` of each sequence.
        lengths: Tokens of each sequence.
    """
    if list(starts) == list(lengths):
        return "dataset"
    return "mixed" if any(starts) else "model"


def all_or_none(stored: Mapping[str, StoredArray | None], source: Path, content: str) -> bool:
    """Return whether all sequences have a sidecar; False if none has.

    Args:
        stored: Name of the sequence -> its sidecar, or None.
        source: Path of the recording, for error messages.
        content: Content of the sidecars, for error messages.

    Raises:
        UserError: Only some sequences have a sidecar.
    """
    without = [name for name, sidecar in stored.items() if sidecar is None]
    if 0 < len(without) < len(stored):
        raise UserError(
            f"{source}: {without[0]!r} has no {content}, but others do; add it for all sequences, or for none"
        )
    return not without
