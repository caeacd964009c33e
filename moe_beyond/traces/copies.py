"""Exact copies: sequences with equal token ids or, in sets without token ids, with equal routing."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def text_digest(content: npt.NDArray[np.integer[Any]], size: int = 16) -> bytes:
    """Return a hash that is equal for exact copies.

    Args:
        content: Token ids ``(T,)`` of a sequence, or its experts ``(T, L, K)`` if it has no token ids.
        size: Size of the hash in bytes.
    """
    return hashlib.blake2b(np.ascontiguousarray(content, "<i4").tobytes(), digest_size=size).digest()


def count_copies(texts: Mapping[str, Collection[bytes]]) -> dict[str, dict[str, int]]:
    """Count exact copies.

    Args:
        texts: Split -> the hash of every sequence, from `text_digest`.

    Returns:
        Split -> ``within``, the number of sequences that repeat an earlier one of the split, and ``of_other_splits``,
        the number of sequences that are also in another split.
    """
    holders = Counter(text for texts_of_split in texts.values() for text in set(texts_of_split))
    return {
        split: {
            "within": len(digests) - len(set(digests)),
            "of_other_splits": sum(holders[text] > 1 for text in digests),
        }
        for split, digests in texts.items()
    }


def describe_copies(copies: Mapping[str, Mapping[str, int]]) -> str:
    """Describe the counts of `count_copies`.

    Example:
        >>> describe_copies({"train": {"within": 4, "of_other_splits": 0}})
        '4 within train'
        >>> describe_copies({"train": {"within": 0, "of_other_splits": 0}})
        'none'
    """
    parts = []
    for split, counts in copies.items():
        parts += [f"{counts['within']:,} within {split}"] if counts["within"] else []
        parts += [f"{counts['of_other_splits']:,} of {split} in other splits"] if counts["of_other_splits"] else []
    return ", ".join(parts) or "none"
