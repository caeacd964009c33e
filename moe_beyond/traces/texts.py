"""Hashes of the texts of a split, which a predictor records so that they are found in other trace sets."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.reader import TraceSet

HASH_BYTES = 6
MOST_HASHES = 4096
"""Most hashes in a sketch: the smallest ones, which are a fair sample of more texts."""
SHORTEST_START = 16
"""Tokens of the shortest start that is hashed: fewer are often only a chat template's."""

Hashes = npt.NDArray[np.uint64]


def text_hashes(traces: TraceSet, split: str | None = None) -> list[Hashes]:
    """Hash every sequence's prompt, and its starts of 16, 32, 64, ... tokens.

    The prompt finds two recordings of one prompt, whatever the model answered. The starts find a text that was cut, and
    one whose prompt and answer are not told apart. A sequence under 16 tokens has one start: all of it. Without a
    prompt, the whole sequence is the prompt. Where a set has no token ids, the experts stand in.

    The lowest bit of a hash is set for an end: the prompt, or the longest start. `count_shared` finds a text where
    both sides hold a hash that is an end of one of them. So the longest start, at least half of one text, begins the
    other. A start that different texts of the split share, such as a system prompt, is no evidence and is left out.

    Not found are texts cut to fewer than 16 tokens, or to a start that they share with others; texts without their
    beginning; and another answer to the same prompt in a set that does not say where answers begin.

    Args:
        traces: The trace set.
        split: One split; all by default.

    Returns:
        Hashes of each sequence, in stored order.

    Raises:
        UserError: A shard is missing or damaged.
    """
    has_ids = traces.manifest.has_token_ids
    prompts: list[int] = []
    starts: list[list[int]] = []
    owner: dict[int, int | None] = {}  # start -> the prompt that it belongs to; None where there are several
    for trace in traces.traces(split):
        content = trace.token_ids if has_ids else trace.experts
        doubled = (SHORTEST_START << power for power in range(len(trace).bit_length()))
        lengths = [length for length in doubled if length <= len(trace)] or [len(trace)]
        prompts.append(_number(content[: trace.decode_start or None]))
        starts.append([_number(content[:length]) for length in lengths])
        for start in starts[-1]:
            owner[start] = prompts[-1] if owner.get(start, prompts[-1]) == prompts[-1] else None
    hashes = []
    for prompt, (*earlier, longest) in zip(prompts, starts, strict=True):
        numbers = [start for start in earlier if owner[start] is not None]
        ends = [prompt, *([longest] if owner[longest] is not None else [])]
        hashes.append(np.array([*numbers, *(end | 1 for end in ends)], np.uint64))
    return hashes


def _number(content: npt.NDArray[np.integer]) -> int:
    """Return the hash of a text as an even number."""
    return int.from_bytes(text_digest(content, HASH_BYTES), "big") & ~1


def sketch(hashes: Sequence[Hashes]) -> str:
    """Write the distinct hashes, or the smallest `MOST_HASHES` of them, as hexadecimal digits in ascending order."""
    distinct = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    return "".join(f"{number:0{2 * HASH_BYTES}x}" for number in distinct[:MOST_HASHES].tolist())


def count_shared(written: str, hashes: Sequence[Hashes]) -> tuple[int, bool]:
    """Count the texts that a sketch also holds.

    Args:
        written: The sketch, as `sketch` returned it. Earlier versions hashed prompts only, without marking ends.
        hashes: Hashes of the texts to look for, as `text_hashes` returned them.

    Returns:
        How many of them it holds, and whether that is exact: a full sketch holds only a sample.

    Raises:
        ValueError: It is no sketch.
    """
    digits = 2 * HASH_BYTES
    if len(written) % digits:
        raise ValueError(f"{len(written)} digits, not a multiple of {digits}")
    held = {int(written[at : at + digits], 16) for at in range(0, len(written), digits)}
    any_start = {number | 1 for number in held}
    shared = sum(any(n | 1 in held or (n & 1 and n in any_start) for n in numbers.tolist()) for numbers in hashes)
    return shared, len(held) < MOST_HASHES
