"""lfu: evict what was demanded (or named by a prefetch) least often in the sequence; counts outlive evictions.

Ties go by recency.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import LAST, CacheState, Ints, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LfuState(NamedTuple):
    """Uses of every expert, ``(L*E,)``."""

    uses: Ints


def state(inputs: PolicyInputs) -> LfuState:
    """Return zero counts."""
    return LfuState(np.zeros(inputs.num_ids, np.int64))


@jit
def use(policy: LfuState, cache: CacheState, expert: int) -> None:
    """Count a use."""
    policy.uses[expert] += 1


@jit
def worth(policy: LfuState, cache: CacheState, expert: int) -> float:
    """Return the uses."""
    return float(policy.uses[expert])


@jit
def victim(policy: LfuState, cache: CacheState, pool: int) -> int:
    """Return the least often used."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


VERBS = Verbs(use, use, ignore_expert, victim)
