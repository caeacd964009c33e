"""Victims by a scan over all residents, for policies whose ranking changes as time passes."""

from collections.abc import Callable
from typing import Any

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, Pool, is_pinned


@jit
def argmin_resident(
    policy: Any, cache: CacheState, pool: int, priority: Callable[[Any, CacheState, int], float], ties: Ints
) -> int:
    """Return the resident with the lowest priority that is not pinned.

    Args:
        policy: Value that the policy's ``init`` returned.
        cache: State of the cache.
        pool: Pool to search.
        priority: Compiled function ``(policy, cache, expert) -> float``.
        ties: Second key for equal priorities, ``(L*E,)``, lowest first; the third key is the id.
    """
    best, lowest = -1, 0.0
    for expert in cache.residents[pool, : cache.pools[pool, Pool.USED]]:
        if is_pinned(cache, expert):
            continue
        value = priority(policy, cache, expert)
        if best < 0 or value < lowest or (value == lowest and (ties[expert], expert) < (ties[best], best)):
            best, lowest = expert, value
    return best


@jit
def goes_before(cache: CacheState, expert: int, other: int) -> bool:
    """Compare two experts of equal priority: by recency, then by the lower id."""
    last, other_last = cache.experts[Expert.LAST_USE, expert], cache.experts[Expert.LAST_USE, other]
    return last < other_last or (last == other_last and expert < other)


@jit
def layers_ahead(cache: CacheState, layer: int) -> int:
    """Return the number of events until a layer runs: 1 for the next layer, L for the current one."""
    current = cache.clock[Clock.LAYER]
    return layer - current if layer > current else len(cache.counters) - current + layer


@jit
def events_ahead(cache: CacheState, expert: int) -> int:
    """Return the number of events until an expert's layer runs."""
    return layers_ahead(cache, cache.experts[Expert.LAYER, expert])
