"""Files next to a recorded sequence: its token ids, and where the model began to write.

``NAME.tokens`` holds one id per token; engines return one more, of the last token that was sampled, which no layer has
seen. ``NAME.decode_start`` is one number: the tokens that the model read before it wrote.
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
    "NAME.tokens.npy next to it: token ids, a whole number per token (T, or T + 1 with the last sampled one); optional",
    "NAME.decode_start.npy next to it: one whole number, the first token that the model wrote; optional",
)
"""Their description in help."""


def beside(path: Path, ending: str) -> StoredArray | None:
    """Look for the companion of a file: ``NAME.tokens.npy`` beside ``NAME.csv``.

    Raises:
        UserError: It is there, and is no array of whole numbers.
    """
    companion = path.with_name(f"{path.stem}{ending}.npy")
    return stored_array(companion) if companion.exists() else None


def read_token_ids(stored: StoredArray | None, length: int, span: slice) -> npt.NDArray[np.int32]:
    """Return the token ids of what was recorded; zeros where there are none.

    Args:
        stored: The ids of all tokens of the request.
        length: Tokens of the request, T.
        span: The tokens that were recorded.

    Raises:
        UserError: They are not as many as the tokens, or no ids.
    """
    if stored is None:
        return np.zeros(span.stop - span.start, np.int32)
    if stored.shape not in ((length,), (length + 1,)):
        raise UserError(f"{stored.where}: has shape {stored.shape}, expected ({length},): an id per recorded token")
    ids: npt.NDArray[Any] = stored.read()[:length]
    if len(outside := ids[(ids < 0) | (ids > np.iinfo(np.int32).max)]):
        raise UserError(f"{stored.where}: {outside[0]} is no token id")
    return ids[span].astype(np.int32)


def by_file(
    tokens: Mapping[str, StoredArray | None], ids: Mapping[str, npt.NDArray[np.int32]]
) -> dict[str, npt.NDArray[np.int32]] | None:
    """Return token ids by the file that they were read from; None where no recording has any.

    Args:
        tokens: By recording, its file of token ids.
        ids: By recording, what was read of it.
    """
    return {stored.where: ids[name] for name, stored in tokens.items() if stored is not None and name in ids} or None


def read_decode_start(stored: StoredArray | None, length: int, span: slice) -> int:
    """Return the first recorded position that the model wrote; their number, as if all was read, where no file says it.

    Args:
        stored: The first position of the request that the model wrote.
        length: Tokens of the request, T.
        span: The tokens that were recorded.

    Raises:
        UserError: It is no such position.
    """
    recorded: int = span.stop - span.start
    if stored is None:
        return recorded
    if stored.shape != ():
        raise UserError(f"{stored.where}: has shape {stored.shape}; decode_start is one number")
    if not 0 <= (start := int(stored.read())) <= length:
        raise UserError(f"{stored.where}: {start} is not in 0..{length}")
    return min(max(start - int(span.start), 0), recorded)


def author_of(starts: Sequence[int], lengths: Sequence[int]) -> str:
    """Say who wrote the text of sequences, as a manifest does."""
    if list(starts) == list(lengths):
        return "dataset"
    return "mixed" if any(starts) else "model"


def all_or_none(stored: Mapping[str, StoredArray | None], source: Path, what: str) -> bool:
    """Tell whether all sequences have a companion, and not none.

    Args:
        stored: Each sequence's, by its name.
        source: The recording.
        what: What they are called.

    Raises:
        UserError: Some have it, and some do not.
    """
    without = [name for name, one in stored.items() if one is None]
    if 0 < len(without) < len(stored):
        raise UserError(f"{source}: {without[0]!r} has no {what}, and others do; give all of them, or none")
    return not without
