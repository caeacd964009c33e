"""lfu: evict what was demanded (or named by a prefetch) least often in the sequence, counts kept across evictions.

Ties go by recency.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import Ints, Verbs
from moe_beyond.cache.jit import jit


class LfuState(NamedTuple):
    """What decides, per expert.

    Attributes:
        uses: Times it was demanded or expected in this sequence.
        last: The event that did so last.
    """

    uses: Ints
    last: Ints


def state(num_ids: int, pools: int, future: tuple[Ints, Ints] | None) -> LfuState:
    """Return zero counts."""
    return LfuState(np.zeros(num_ids, np.int64), np.zeros(num_ids, np.int64))


@jit
def hit(state: LfuState, expert: int, pool: int, now: int) -> None:
    """Count a use."""
    state.uses[expert] += 1
    state.last[expert] = now


@jit
def insert(state: LfuState, expert: int, pool: int, now: int) -> None:
    """Count a use."""
    hit(state, expert, pool, now)


@jit
def evict(state: LfuState, expert: int, pool: int) -> None:
    """Keep the count."""


@jit
def victim(state: LfuState, pool: int, residents: Ints, shield: Ints, mark: int) -> int:
    """Return the least often used; of those the least recent; of those the lowest."""
    best = -1
    for expert in residents:
        if shield[expert] >= mark:
            continue
        if best < 0 or (state.uses[expert], state.last[expert], expert) < (state.uses[best], state.last[best], best):
            best = expert
    return best


VERBS = Verbs(hit, insert, evict, victim)
