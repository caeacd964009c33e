"""lru: evict the least recently used expert.

A ring by recency per pool makes every operation O(1), except for pinned experts and ties.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, PolicyHooks, is_pinned, unsigned
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class Ring(IntEnum):
    """Columns of `LruState.ring`: the next more recently and the next less recently used expert."""

    NEWER = 0
    OLDER = 1


class LruState(NamedTuple):
    """Ring of residents of each pool.

    Attributes:
        ring: Neighbours of each expert, ``(L*E + pools, 2)`` uint32, columns `Ring`; the head of pool p's ring is the
            number ``L*E + p``.
    """

    ring: npt.NDArray[np.uint32]


def init(inputs: PolicyInputs) -> LruState:
    """Return empty rings."""
    numbers = np.arange(inputs.num_ids + len(inputs.capacity), dtype=np.uint32)
    return LruState(np.repeat(numbers[:, None], 2, axis=1))


@jit
def on_admit(policy: LruState, cache: CacheState, expert: int) -> None:
    """Add an expert as the most recent; among experts used at the same time the lowest is the oldest."""
    heads, last = unsigned(cache.experts.shape[1]), cache.experts[Expert.LAST_USE, expert]
    newer = heads if len(cache.pools) == 1 else unsigned(heads + cache.experts[Expert.POOL, expert])
    older = policy.ring[newer, Ring.OLDER]
    while older < heads and cache.experts[Expert.LAST_USE, older] == last and older > expert:
        newer, older = older, policy.ring[older, Ring.OLDER]
    policy.ring[older, Ring.NEWER], policy.ring[expert, Ring.OLDER] = expert, older
    policy.ring[expert, Ring.NEWER], policy.ring[newer, Ring.OLDER] = newer, expert


@jit
def on_evict(policy: LruState, cache: CacheState, expert: int) -> None:
    """Remove an expert from its ring."""
    newer, older = policy.ring[expert, Ring.NEWER], policy.ring[expert, Ring.OLDER]
    policy.ring[newer, Ring.OLDER], policy.ring[older, Ring.NEWER] = older, newer


@jit
def on_hit(policy: LruState, cache: CacheState, expert: int) -> None:
    """Move an expert to the most recent end."""
    on_evict(policy, cache, expert)
    on_admit(policy, cache, expert)


@jit
def victim(policy: LruState, cache: CacheState, pool: int) -> int:
    """Return the least recently used resident that is not pinned."""
    expert = policy.ring[unsigned(cache.experts.shape[1] + pool), Ring.NEWER]
    while is_pinned(cache, expert):
        expert = policy.ring[expert, Ring.NEWER]
    return expert


HOOKS = PolicyHooks(on_hit, on_admit, on_evict, victim)
