"""Exact copies: sequences of equal token ids or, where none were recorded, of equal routing."""

import hashlib
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError


def text_digest(content: npt.NDArray[np.integer[Any]], size: int = 16) -> bytes:
    """Return the hash that sequences are compared by: equal for exact copies.

    Args:
        content: A sequence's token ids ``(T,)``; where none were recorded, its experts ``(T, L, K)``.
        size: Bytes of the hash.
    """
    return hashlib.blake2b(np.ascontiguousarray(content, "<i4").tobytes(), digest_size=size).digest()


def without_copies(held_out: Collection[int], texts: Mapping[int, Hashable]) -> set[int]:
    """Leave out of a validation split what training holds too.

    A sequence chosen for validation whose text also is in training goes to training. Nothing moves the other way, and
    copies that are all in validation stay there.

    Args:
        held_out: Numbers of the sequences chosen for validation.
        texts: Number -> text, of all sequences; equal for copies.

    Returns:
        Those of ``held_out`` that stay in validation.

    Raises:
        UserError: None stays.
    """
    training = {text for number, text in texts.items() if number not in held_out}
    kept = {number for number in held_out if texts[number] not in training}
    if held_out and not kept:
        raise UserError("--val-blocks: every sequence chosen for validation is a copy of one in training")
    return kept


def count_copies(texts: Mapping[str, Collection[bytes]]) -> dict[str, dict[str, int]]:
    """Count exact copies.

    Args:
        texts: Split -> the digest of every sequence.

    Returns:
        Split -> ``within``, how many of its sequences repeat an earlier one of the split, and ``of_other_splits``, how
        many have a text that another split holds too.
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
    """Write the counts of `count_copies` in words.

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
