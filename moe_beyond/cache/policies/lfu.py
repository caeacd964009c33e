"""lfu: evict the expert that was demanded or prefetched least often in the sequence.

Counts outlive evictions. Ties go by recency.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, Ints, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LfuState(NamedTuple):
    """Number of uses of every expert, ``(L*E,)`` int64."""

    uses: Ints


def init(inputs: PolicyInputs) -> LfuState:
    """Return zero counts."""
    return LfuState(np.zeros(inputs.num_ids, np.int64))


@jit
def use(policy: LfuState, cache: CacheState, expert: int) -> None:
    """Count a use."""
    policy.uses[expert] += 1


@jit
def priority(policy: LfuState, cache: CacheState, expert: int) -> float:
    """Return the number of uses."""
    return float(policy.uses[expert])


@jit
def victim(policy: LfuState, cache: CacheState, pool: int) -> int:
    """Return the least frequently used resident."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(use, use, ignore_expert, victim)
