"""lfru: evict the expert with the fewest uses / (events since the last use + 1) (vllm-project/vllm#38256).

Counts outlive evictions. Among experts with equal counts the oldest goes first, so the victim is the oldest expert of a
bucket of `lfu`.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Ints, PolicyHooks, unsigned
from moe_beyond.cache.policies import lfu
from moe_beyond.cache.policies._ring import oldest
from moe_beyond.cache.policies._scan import goes_before
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LfruState(NamedTuple):
    """Counts and residents of `lfu`, and the event of every expert's last use, ``(L*E,)`` int64."""

    counts: lfu.LfuState
    event: Ints


def init(inputs: PolicyInputs) -> LfruState:
    """Return zero counts and no residents."""
    return LfruState(lfu.init(inputs), np.zeros(inputs.num_ids, np.int64))


@jit
def on_hit(policy: LfruState, cache: CacheState, expert: int) -> None:
    """Count a use of a resident."""
    policy.event[expert] = cache.clock[Clock.EVENT]
    lfu.on_hit(policy.counts, cache, expert)


@jit
def on_admit(policy: LfruState, cache: CacheState, expert: int) -> None:
    """Count a use, and add the expert to the residents."""
    policy.event[expert] = cache.clock[Clock.EVENT]
    lfu.on_admit(policy.counts, cache, expert)


@jit
def on_evict(policy: LfruState, cache: CacheState, expert: int) -> None:
    """Remove an expert from the residents."""
    lfu.on_evict(policy.counts, cache, expert)


@jit
def victim(policy: LfruState, cache: CacheState, pool: int) -> int:
    """Return the resident with the fewest uses per event of its age."""
    buckets, heads, end = policy.counts.buckets, cache.experts.shape[1], unsigned(pool)
    best, lowest = -1, 0.0
    bucket = buckets[end, lfu.Bucket.MORE]
    while bucket != end:
        expert = oldest(policy.counts.rings, cache, unsigned(heads + bucket))
        if expert < heads:
            age = cache.clock[Clock.EVENT] - policy.event[expert]
            rate = buckets[bucket, lfu.Bucket.USES] / (age + 1)
            if best < 0 or rate < lowest or (rate == lowest and goes_before(cache, expert, best)):
                best, lowest = int(expert), rate
        bucket = buckets[bucket, lfu.Bucket.MORE]
    return best


HOOKS = PolicyHooks(on_hit, on_admit, on_evict, victim)
