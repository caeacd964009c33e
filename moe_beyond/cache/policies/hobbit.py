"""hobbit: HOBBIT's score (arXiv 2411.01433, eq. 3): recency, frequency and layer distance with equal weights.

The score is R/4T + F/4T + H/4T + (1 - a/L)/4. T is the number of steps so far, R the step of the last use, F the number
of uses, H the number of uses at high precision, and a + 1 the events until the expert's layer runs. Traces do not
record precision, so H is F here. Experts are ranked by the integer (R + 2F) L - a T, which has the same order as the
score, so rounding breaks no tie. The state covers one sequence: nothing is kept across sequences.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident, events_ahead
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class HobbitState(NamedTuple):
    """Number of uses of every expert, and the step of its last use, ``(L*E,)`` int64 each."""

    uses: Ints
    step: Ints


def init(inputs: PolicyInputs) -> HobbitState:
    """Return zeros."""
    return HobbitState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def use(policy: HobbitState, cache: CacheState, expert: int) -> None:
    """Count a use."""
    policy.uses[expert] += 1
    policy.step[expert] = cache.clock[Clock.STEP]


@jit
def priority(policy: HobbitState, cache: CacheState, expert: int) -> float:
    """Return 4 L T times the score, minus L T: an integer, exact as a float below 2**53."""
    used = policy.step[expert] + 2 * policy.uses[expert]
    return float(used * len(cache.counters) - (events_ahead(cache, expert) - 1) * max(cache.clock[Clock.STEP], 1))


@jit
def victim(policy: HobbitState, cache: CacheState, pool: int) -> int:
    """Return the resident with the lowest score."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(use, use, ignore_expert, victim)
