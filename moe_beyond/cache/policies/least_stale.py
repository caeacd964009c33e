"""least_stale: SpecMD's policy (arXiv 2602.03921), as re-implementations describe it.

An expert that was demanded or prefetched in this forward pass (a step) is current; all others are stale. The victim is
the stale resident whose layer runs last. If no resident is stale, it is the current one whose layer runs last. Ties go
first in, first out.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Ints, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident, events_ahead
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LeastStaleState(NamedTuple):
    """Step of every expert's last use, and time of its insertion, ``(L*E,)`` int64 each."""

    step: Ints
    since: Ints


def init(inputs: PolicyInputs) -> LeastStaleState:
    """Return zeros."""
    return LeastStaleState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def on_hit(policy: LeastStaleState, cache: CacheState, expert: int) -> None:
    """Mark an expert as current."""
    policy.step[expert] = cache.clock[Clock.STEP]


@jit
def on_admit(policy: LeastStaleState, cache: CacheState, expert: int) -> None:
    """Mark an expert as current, and note the time."""
    policy.step[expert] = cache.clock[Clock.STEP]
    policy.since[expert] = cache.clock[Clock.TIME]


@jit
def priority(policy: LeastStaleState, cache: CacheState, expert: int) -> float:
    """Rank current experts above stale ones, and within each group the layers that run sooner above later ones."""
    above_all_stale = 2.0 * len(cache.counters) if policy.step[expert] == cache.clock[Clock.STEP] else 0.0
    return above_all_stale - events_ahead(cache, expert)


@jit
def victim(policy: LeastStaleState, cache: CacheState, pool: int) -> int:
    """Return the stale resident whose layer runs last."""
    return argmin_resident(policy, cache, pool, priority, policy.since)


HOOKS = PolicyHooks(on_hit, on_admit, ignore_expert, victim)
