"""lfru: evict the expert with the fewest uses / (events since the last use + 1) (vllm-project/vllm#38256).

Counts outlive evictions.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LfruState(NamedTuple):
    """Number of uses of every expert and the event of its last use, ``(L*E,)`` int64 each."""

    uses: Ints
    event: Ints


def init(inputs: PolicyInputs) -> LfruState:
    """Return zero counts."""
    return LfruState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def use(policy: LfruState, cache: CacheState, expert: int) -> None:
    """Count a use."""
    policy.uses[expert] += 1
    policy.event[expert] = cache.clock[Clock.EVENT]


@jit
def priority(policy: LfruState, cache: CacheState, expert: int) -> float:
    """Return the number of uses divided by the age."""
    return policy.uses[expert] / (cache.clock[Clock.EVENT] - policy.event[expert] + 1)


@jit
def victim(policy: LfruState, cache: CacheState, pool: int) -> int:
    """Return the resident with the lowest priority."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(use, use, ignore_expert, victim)
