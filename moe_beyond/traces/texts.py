"""Hashes of the prompts of a split, which a predictor records so that they are found in other trace sets."""

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.reader import TraceSet

HASH_BYTES = 6
MOST_HASHES = 4096
"""Most hashes in a sketch: the smallest ones, which are a fair sample of more texts."""

Hashes = npt.NDArray[np.uint64]


def text_hashes(traces: TraceSet, split: str | None = None) -> Hashes:
    """Hash every sequence's prompt, so that two recordings of one prompt agree whatever the model answered.

    Where a set has no token ids, the experts of the prompt stand in. A sequence without a prompt is hashed whole.

    Args:
        traces: The trace set.
        split: One split; all by default.

    Returns:
        ``(sequences,)`` uint64, in stored order.

    Raises:
        UserError: A shard is missing or damaged.
    """
    has_ids = traces.manifest.has_token_ids
    hashes = []
    for trace in traces.traces(split):
        content = trace.token_ids if has_ids else trace.experts
        digest = text_digest(content[: trace.decode_start or None], HASH_BYTES)
        hashes.append(int.from_bytes(digest, "big"))
    return np.array(hashes, np.uint64)


def sketch(hashes: Hashes) -> str:
    """Write the distinct hashes, or the smallest `MOST_HASHES` of them, as hexadecimal digits in ascending order."""
    return "".join(f"{number:0{2 * HASH_BYTES}x}" for number in np.unique(hashes)[:MOST_HASHES].tolist())


def count_shared(written: str, hashes: Hashes) -> tuple[int, bool]:
    """Count the texts that a sketch also holds.

    Args:
        written: The sketch, as `sketch` returned it.
        hashes: ``(n,)`` uint64, hashes of the texts to look for.

    Returns:
        How many of them it holds, and whether that is exact: a full sketch holds only a sample.

    Raises:
        ValueError: It is no sketch.
    """
    digits = 2 * HASH_BYTES
    if len(written) % digits:
        raise ValueError(f"{len(written)} digits, not a multiple of {digits}")
    held = np.array([int(written[at : at + digits], 16) for at in range(0, len(written), digits)], np.uint64)
    return int(np.isin(hashes, held).sum()), len(held) < MOST_HASHES
