"""Rings of residents by recency, for policies that keep their residents in an order instead of scanning them.

A ring is a doubly linked list. Its head is a number from L*E on, so that experts and heads share one array of
neighbours. Every operation is O(1), except for pinned experts and ties.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, is_pinned, unsigned

Rings = npt.NDArray[np.uint32]


class Ring(IntEnum):
    """Columns of the neighbours: the next more recently and the next less recently used expert, or the head."""

    NEWER = 0
    OLDER = 1


def empty_rings(num_ids: int, heads: int) -> Rings:
    """Return empty rings.

    Args:
        num_ids: Number of experts L * E.
        heads: Number of rings.

    Returns:
        Neighbours of each expert and each head, ``(L*E + heads, 2)`` uint32, columns `Ring`; the head of ring r is the
        number ``L*E + r``.
    """
    numbers = np.arange(num_ids + heads, dtype=np.uint32)
    return np.repeat(numbers[:, None], 2, axis=1)


@jit
def link(rings: Rings, cache: CacheState, head: int, expert: int) -> None:
    """Add an expert as the most recent; among experts used at the same time the lowest is the oldest.

    Args:
        rings: Neighbours of each expert and each head.
        cache: State of the cache.
        head: Head of the ring, ``L*E + r``, unsigned.
        expert: Expert in no ring, whose last use is now.
    """
    heads, last = unsigned(cache.experts.shape[1]), cache.experts[Expert.LAST_USE, expert]
    newer, older = head, rings[head, Ring.OLDER]
    while older < heads and cache.experts[Expert.LAST_USE, older] == last and older > expert:
        newer, older = older, rings[older, Ring.OLDER]
    rings[older, Ring.NEWER], rings[expert, Ring.OLDER] = expert, older
    rings[expert, Ring.NEWER], rings[newer, Ring.OLDER] = newer, expert


@jit
def unlink(rings: Rings, expert: int) -> None:
    """Remove an expert from its ring."""
    newer, older = rings[expert, Ring.NEWER], rings[expert, Ring.OLDER]
    rings[newer, Ring.OLDER], rings[older, Ring.NEWER] = older, newer


@jit
def oldest(rings: Rings, cache: CacheState, head: int) -> int:
    """Return the least recently used expert of a ring that is not pinned, or the head if there is none."""
    heads, expert = unsigned(cache.experts.shape[1]), rings[head, Ring.NEWER]
    while expert < heads and is_pinned(cache, expert):
        expert = rings[expert, Ring.NEWER]
    return expert
