"""Hashes of training texts, with which a predictor recognises them in other trace sets."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.reader import Part, TraceSet

HASH_BYTES = 6
MAX_HASHES = 4096
"""Largest number of hashes in a sketch; the smallest hashes of a larger set are an unbiased sample."""
SHORTEST_START = 16
"""Tokens of the shortest start that is hashed; shorter starts are often only a chat template."""

Hashes = npt.NDArray[np.uint64]


def text_hashes(traces: TraceSet, split: str | None = None) -> list[Hashes]:
    """Hash every sequence's prompt, and its starts of 16, 32, 64, ... tokens.

    The hash of the prompt finds two recordings of one prompt with different answers. The starts find truncated texts,
    and texts whose decode phase is not marked. A sequence under 16 tokens has one start, which is the whole sequence.
    If a sequence has no prompt, the whole sequence is hashed as one. If a set has no token ids, experts are hashed.

    The lowest bit of a hash is set for an end: the prompt, or the longest start. `count_shared` finds a text if both
    sides have a hash that is an end of one of them. The longest start, at least half of one text, then begins the
    other text. A start that several texts of the split share, such as a system prompt, is no evidence and is omitted.

    Some copies are not found: texts cut to fewer than 16 tokens or to a shared start, texts without their beginning,
    and a different answer to the same prompt in a set that does not mark the decode phase.

    Args:
        traces: The trace set.
        split: Name of a split (default: all splits).

    Returns:
        Hashes of each sequence, in stored order.

    Raises:
        UserError: The split does not exist, or a shard is damaged.
    """
    return hashes_of(text_starts(traces, split))


def text_starts(traces: TraceSet, part: Part = None) -> list[tuple[int, list[int]]]:
    """Hash every sequence's prompt and starts, for `hashes_of`.

    Args:
        traces: The trace set.
        part: Part of the set (default: all splits).

    Returns:
        Hash of the prompt and of the starts of each sequence, in stored order.

    Raises:
        UserError: A shard is damaged.
    """
    has_ids = traces.manifest.has_token_ids
    found: list[tuple[int, list[int]]] = []
    for trace in traces.traces(part):
        content = trace.token_ids if has_ids else trace.experts
        doubled = (SHORTEST_START << power for power in range(len(trace).bit_length()))
        lengths = [length for length in doubled if length <= len(trace)] or [len(trace)]
        prompt = _number(content[: trace.decode_start or None])
        found.append((prompt, [_number(content[:length]) for length in lengths]))
    return found


def hashes_of(found: Sequence[tuple[int, list[int]]]) -> list[Hashes]:
    """Return the hashes of `text_hashes` from those of `text_starts` of all sequences."""
    owner: dict[int, int | None] = {}  # start -> its prompt; None if several prompts have it
    for prompt, starts in found:
        for start in starts:
            owner[start] = prompt if owner.get(start, prompt) == prompt else None
    hashes = []
    for prompt, (*earlier, longest) in found:
        numbers = [start for start in earlier if owner[start] is not None]
        ends = [prompt, *([longest] if owner[longest] is not None else [])]
        hashes.append(np.array([*numbers, *(end | 1 for end in ends)], np.uint64))
    return hashes


def _number(content: npt.NDArray[np.integer]) -> int:
    """Return the hash of a text as an even number."""
    return int.from_bytes(text_digest(content, HASH_BYTES), "big") & ~1


def sketch(hashes: Sequence[Hashes]) -> str:
    """Return the smallest `MAX_HASHES` distinct hashes as hexadecimal digits, in ascending order.

    Args:
        hashes: Hashes of the texts, from `text_hashes`.
    """
    distinct = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    return "".join(f"{number:0{2 * HASH_BYTES}x}" for number in distinct[:MAX_HASHES].tolist())


def count_shared(written: str, hashes: Sequence[Hashes]) -> tuple[int, bool]:
    """Count the texts that are also in a sketch.

    Args:
        written: Result of `sketch`. Earlier versions hashed only prompts, without marking ends.
        hashes: Hashes of the texts to search for, from `text_hashes`.

    Returns:
        Number of these texts in the sketch, and whether it is exact; a full sketch is only a sample.

    Raises:
        ValueError: The text is not a sketch.
    """
    digits = 2 * HASH_BYTES
    if len(written) % digits:
        raise ValueError(f"{len(written)} digits, not a multiple of {digits}")
    held = {int(written[at : at + digits], 16) for at in range(0, len(written), digits)}
    any_start = {number | 1 for number in held}
    shared = sum(any(n | 1 in held or (n & 1 and n in any_start) for n in numbers.tolist()) for numbers in hashes)
    return shared, len(held) < MAX_HASHES
