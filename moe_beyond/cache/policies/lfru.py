"""lfru: evict the least uses / (events since the last use + 1); counts outlive evictions (vllm-project/vllm#38256)."""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import EVENT, LAST, CacheState, Ints, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LfruState(NamedTuple):
    """Uses of every expert, and the event of the last, ``(L*E,)`` each."""

    uses: Ints
    event: Ints


def state(inputs: PolicyInputs) -> LfruState:
    """Return zero counts."""
    return LfruState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def use(policy: LfruState, cache: CacheState, expert: int) -> None:
    """Count a use."""
    policy.uses[expert] += 1
    policy.event[expert] = cache.now[EVENT]


@jit
def worth(policy: LfruState, cache: CacheState, expert: int) -> float:
    """Return uses over age."""
    return policy.uses[expert] / (cache.now[EVENT] - policy.event[expert] + 1)


@jit
def victim(policy: LfruState, cache: CacheState, pool: int) -> int:
    """Return the one worth least."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


VERBS = Verbs(use, use, ignore_expert, victim)
