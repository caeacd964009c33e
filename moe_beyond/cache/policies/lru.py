"""lru: evict the least recently used expert."""

from typing import NamedTuple

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, PolicyHooks, unsigned
from moe_beyond.cache.policies._ring import Rings, empty_rings, link, oldest, unlink
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


class LruState(NamedTuple):
    """One ring of residents per pool, ``(L*E + pools, 2)`` uint32."""

    rings: Rings


def init(inputs: PolicyInputs) -> LruState:
    """Return empty rings."""
    return LruState(empty_rings(inputs.num_ids, len(inputs.capacity)))


@jit
def on_admit(policy: LruState, cache: CacheState, expert: int) -> None:
    """Add an expert as the most recent."""
    heads = unsigned(cache.experts.shape[1])
    head = heads if len(cache.pools) == 1 else unsigned(heads + cache.experts[Expert.POOL, expert])
    link(policy.rings, cache, head, expert)


@jit
def on_evict(policy: LruState, cache: CacheState, expert: int) -> None:
    """Remove an expert from its ring."""
    unlink(policy.rings, expert)


@jit
def on_hit(policy: LruState, cache: CacheState, expert: int) -> None:
    """Move an expert to the most recent end."""
    on_evict(policy, cache, expert)
    on_admit(policy, cache, expert)


@jit
def victim(policy: LruState, cache: CacheState, pool: int) -> int:
    """Return the least recently used resident that is not pinned."""
    return oldest(policy.rings, cache, unsigned(cache.experts.shape[1] + pool))


HOOKS = PolicyHooks(on_hit, on_admit, on_evict, victim)
