"""lru: evict what was used longest ago. A ring by recency per pool: O(1) but for shielded experts and for ties."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.core import LAST, POOL, CacheState, Verbs, is_held, unsigned
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False
NEWER, OLDER = range(2)


class LruState(NamedTuple):
    """A ring of residents per pool; the ring's head of pool p is the number ``L*E + p``.

    Attributes:
        links: ``(L*E + pools, 2)`` uint32, the next more and the next less recently used.
    """

    links: npt.NDArray[np.uint32]


def state(inputs: PolicyInputs) -> LruState:
    """Return empty rings."""
    numbers = np.arange(inputs.num_ids + len(inputs.capacity), dtype=np.uint32)
    return LruState(np.repeat(numbers[:, None], 2, axis=1))


@jit
def insert(policy: LruState, cache: CacheState, expert: int) -> None:
    """Link in as the most recent; of those used at the same moment the lowest is the oldest."""
    heads, last = unsigned(cache.experts.shape[1]), cache.experts[LAST, expert]
    newer = heads if len(cache.pools) == 1 else unsigned(heads + cache.experts[POOL, expert])
    older = policy.links[newer, OLDER]
    while older < heads and cache.experts[LAST, older] == last and older > expert:
        newer, older = older, policy.links[older, OLDER]
    policy.links[older, NEWER], policy.links[expert, OLDER] = expert, older
    policy.links[expert, NEWER], policy.links[newer, OLDER] = newer, expert


@jit
def evict(policy: LruState, cache: CacheState, expert: int) -> None:
    """Unlink."""
    newer, older = policy.links[expert, NEWER], policy.links[expert, OLDER]
    policy.links[newer, OLDER], policy.links[older, NEWER] = older, newer


@jit
def hit(policy: LruState, cache: CacheState, expert: int) -> None:
    """Move to the most recent end."""
    evict(policy, cache, expert)
    insert(policy, cache, expert)


@jit
def victim(policy: LruState, cache: CacheState, pool: int) -> int:
    """Return the least recent that is not shielded."""
    expert = policy.links[unsigned(cache.experts.shape[1] + pool), NEWER]
    while is_held(cache, expert):
        expert = policy.links[expert, NEWER]
    return expert


VERBS = Verbs(hit, insert, evict, victim)
