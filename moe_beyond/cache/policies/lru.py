"""lru: evict what was used longest ago. A linked list by recency per pool, O(1) but for shielded experts."""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import Ints, Verbs
from moe_beyond.cache.jit import jit


class LruState(NamedTuple):
    """Links of a ring per pool; the ring's head of pool p is the number ``L*E + p``.

    Attributes:
        newer: The next more recently used.
        older: The next less recently used.
    """

    newer: Ints
    older: Ints


def state(num_ids: int, pools: int, future: tuple[Ints, Ints] | None) -> LruState:
    """Return empty rings."""
    return LruState(np.arange(num_ids + pools), np.arange(num_ids + pools))


@jit
def insert(state: LruState, expert: int, pool: int, now: int) -> None:
    """Link in as the most recent: just older than the head."""
    head = len(state.newer) - 1 - pool
    newest = state.older[head]
    state.newer[newest] = expert
    state.older[expert] = newest
    state.newer[expert] = head
    state.older[head] = expert


@jit
def evict(state: LruState, expert: int, pool: int) -> None:
    """Unlink."""
    newer, older = state.newer[expert], state.older[expert]
    state.older[newer] = older
    state.newer[older] = newer


@jit
def hit(state: LruState, expert: int, pool: int, now: int) -> None:
    """Move to the most recent end."""
    evict(state, expert, pool)
    insert(state, expert, pool, now)


@jit
def victim(state: LruState, pool: int, residents: Ints, shield: Ints, mark: int) -> int:
    """Return the least recent that is not shielded."""
    expert: int = state.newer[len(state.newer) - 1 - pool]
    while shield[expert] >= mark:
        expert = state.newer[expert]
    return expert


VERBS = Verbs(hit, insert, evict, victim)
