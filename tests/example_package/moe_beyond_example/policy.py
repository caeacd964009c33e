"""mru: evict the most recently used expert."""

from typing import Any

from moe_beyond.cache import CacheState, Expert, PolicyHooks, PolicyInputs, argmin_resident, ignore_expert, jit

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


def init(inputs: PolicyInputs) -> int:
    """Return 0: the policy has no arrays of its own, because the cache stores the last use."""
    return 0


@jit
def priority(policy: Any, cache: CacheState, expert: int) -> float:
    """Return the negative time of the last use: the lowest priority is evicted."""
    return -float(cache.experts[Expert.LAST_USE, expert])


@jit
def victim(policy: Any, cache: CacheState, pool: int) -> int:
    """Return the most recently used resident that is not pinned."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(ignore_expert, ignore_expert, ignore_expert, victim)
