"""Finding a victim by looking at every resident, for policies whose ranking changes as time passes."""

from collections.abc import Callable
from typing import Any

from moe_beyond.cache.core import IN_LAYER, LAYER, USED, CacheState, Ints, is_held
from moe_beyond.cache.jit import jit


@jit
def least(policy: Any, cache: CacheState, pool: int, worth: Callable[[Any, CacheState, int], float], ties: Ints) -> int:
    """Return the resident of a pool, not shielded, that is worth least.

    Args:
        policy: The policy's own state.
        cache: The cache.
        pool: Which pool.
        worth: ``(policy, cache, expert)``, compiled.
        ties: ``(L*E,)``; of those worth the same, the one with the least of these goes; of those the lowest.
    """
    best, lowest = -1, 0.0
    for expert in cache.residents[pool, : cache.pools[pool, USED]]:
        if is_held(cache, expert):
            continue
        value = worth(policy, cache, expert)
        if best < 0 or value < lowest or (value == lowest and (ties[expert], expert) < (ties[best], best)):
            best, lowest = expert, value
    return best


@jit
def layers_ahead(cache: CacheState, layer: int) -> int:
    """Return in how many events a layer runs: 1 for the next layer, L for the one that runs now."""
    current = cache.now[LAYER]
    return layer - current if layer > current else len(cache.counters) - current + layer


@jit
def events_ahead(cache: CacheState, expert: int) -> int:
    """Return in how many events an expert's layer runs."""
    return layers_ahead(cache, cache.experts[IN_LAYER, expert])
