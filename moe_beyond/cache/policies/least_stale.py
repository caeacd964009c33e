"""least_stale: SpecMD's policy (arXiv 2602.03921), as re-implementations describe it.

What was demanded or named in this forward pass (a step) is current, all else stale. The victim is the stale resident
whose layer runs again last; where none is stale, the current one. Ties: first in, first out.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import MOMENT, STEP, CacheState, Ints, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import events_ahead, least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LeastStaleState(NamedTuple):
    """Of every expert ``(L*E,)``: the step that last touched it, and the moment it came in."""

    step: Ints
    since: Ints


def state(inputs: PolicyInputs) -> LeastStaleState:
    """Return zeros."""
    return LeastStaleState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def hit(policy: LeastStaleState, cache: CacheState, expert: int) -> None:
    """It is current."""
    policy.step[expert] = cache.now[STEP]


@jit
def insert(policy: LeastStaleState, cache: CacheState, expert: int) -> None:
    """It is current, and came in now."""
    policy.step[expert] = cache.now[STEP]
    policy.since[expert] = cache.now[MOMENT]


@jit
def worth(policy: LeastStaleState, cache: CacheState, expert: int) -> float:
    """Rank the current above the stale; among either, those that run soon above those that run late."""
    above_all_stale = 2.0 * len(cache.counters) if policy.step[expert] == cache.now[STEP] else 0.0
    return above_all_stale - events_ahead(cache, expert)


@jit
def victim(policy: LeastStaleState, cache: CacheState, pool: int) -> int:
    """Return the stale one that runs last."""
    return least(policy, cache, pool, worth, policy.since)


VERBS = Verbs(hit, insert, ignore_expert, victim)
