"""hobbit: HOBBIT's score (arXiv 2411.01433, eq. 3): recency, frequency and layer distance, weighted evenly.

score = R/4T + F/4T + H/4T + (1 - a/L)/4, with T steps so far, R the step of the last use, F uses, H uses at high
precision, and a + 1 the events until the expert's layer runs. Traces do not tell precision: H is F here. Experts are
ranked by the whole number (R + 2F) L - a T, which orders them as the score does, so that rounding breaks no tie. The
sequence is its memory: nothing is kept across sequences.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import LAST, STEP, CacheState, Ints, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import events_ahead, least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class HobbitState(NamedTuple):
    """Of every expert ``(L*E,)``: its uses, and the step of the last."""

    uses: Ints
    step: Ints


def state(inputs: PolicyInputs) -> HobbitState:
    """Return zeros."""
    return HobbitState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def use(policy: HobbitState, cache: CacheState, expert: int) -> None:
    """Count a use."""
    policy.uses[expert] += 1
    policy.step[expert] = cache.now[STEP]


@jit
def worth(policy: HobbitState, cache: CacheState, expert: int) -> float:
    """Return 4 L T times the score, less L T: a whole number, exact as a float below 2**53."""
    used = policy.step[expert] + 2 * policy.uses[expert]
    return float(used * len(cache.counters) - (events_ahead(cache, expert) - 1) * max(cache.now[STEP], 1))


@jit
def victim(policy: HobbitState, cache: CacheState, pool: int) -> int:
    """Return the one of the least score."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


VERBS = Verbs(use, use, ignore_expert, victim)
