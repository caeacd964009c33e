"""belady: evict what is used again farthest in the future (Belady 1966).

No policy that must take in what is demanded, and does not prefetch, has more hits over a whole sequence from a cold
cache. Where a warm-up is left out of the count, that holds for warm-up and count together.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import Ints, Verbs
from moe_beyond.cache.jit import jit

NEVER = np.iinfo(np.int64).max


class BeladyState(NamedTuple):
    """When every expert is demanded.

    Attributes:
        events: All demands' event numbers, expert by expert, ascending.
        cursor: Per expert, its next demand in ``events``.
        end: Per expert, where its demands end.
    """

    events: Ints
    cursor: Ints
    end: Ints


def state(num_ids: int, pools: int, future: tuple[Ints, Ints] | None) -> BeladyState:
    """Index the future by expert.

    Args:
        num_ids: L * E.
        pools: Pools; not used.
        future: Every demand in order: the experts ``(n,)`` and the numbers of their events ``(n,)``.
    """
    if future is None:
        raise ValueError("belady needs to know the future")
    experts, events = future
    order = np.argsort(experts, kind="stable")
    end = np.cumsum(np.bincount(experts, minlength=num_ids))
    return BeladyState(events[order], np.concatenate([[0], end[:-1]]), end)


@jit
def _next_use(state: BeladyState, expert: int) -> int:
    place = state.cursor[expert]
    return state.events[place] if place < state.end[expert] else NEVER


@jit
def hit(state: BeladyState, expert: int, pool: int, now: int) -> None:
    """Look past the present event."""
    while state.cursor[expert] < state.end[expert] and state.events[state.cursor[expert]] <= now:
        state.cursor[expert] += 1


@jit
def insert(state: BeladyState, expert: int, pool: int, now: int) -> None:
    """Look past the present event."""
    hit(state, expert, pool, now)


@jit
def evict(state: BeladyState, expert: int, pool: int) -> None:
    """Nothing to forget."""


@jit
def victim(state: BeladyState, pool: int, residents: Ints, shield: Ints, mark: int) -> int:
    """Return the one whose next use is farthest; of those the lowest."""
    best, farthest = -1, -1
    for expert in residents:
        if shield[expert] >= mark:
            continue
        use = _next_use(state, expert)
        if use > farthest or (use == farthest and expert < best):
            best, farthest = expert, use
    return best


VERBS = Verbs(hit, insert, evict, victim)
