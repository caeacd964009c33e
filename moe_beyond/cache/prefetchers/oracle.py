"""oracle: the experts of the next events, the soonest first, as many as the cache has room for.

On an interconnect that takes time, this is the aggressive strategy of Cao et al. (SIGMETRICS 1995): always transfer the
next missing expert, and never evict one that is needed sooner for it.
"""

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, Pool, Scratch
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings


@jit
def select(cache: CacheState, settings: PrefetchSettings, future: FutureView, layer: int) -> int:
    """Select the next experts of every pool, at most its capacity, from as many events as could fill the cache.

    Returns:
        Number of selected experts.
    """
    layers = len(cache.counters)
    smallest = cache.experts[Expert.UNITS, 0]
    for other in range(1, layers):
        smallest = min(smallest, cache.experts[Expert.UNITS, other * cache.experts.shape[1] // layers])
    horizon = int(cache.pools[:, Pool.CAPACITY].sum()) // (smallest * settings.top_k) + 1
    seen = cache.scratch_int[Scratch.ORDER]
    taken = cache.scratch_int[Scratch.MARKED, : len(cache.pools)]
    seen[:] = 0
    taken[:] = 0
    count, first = 0, future.event[0]
    for event in range(first, min(first + horizon, len(future.offsets) - 1)):
        for i in range(future.offsets[event], future.offsets[event + 1]):
            expert = future.ids[i]
            pool = cache.experts[Expert.POOL, expert]
            units = cache.experts[Expert.UNITS, expert]
            if seen[expert] == 0 and taken[pool] + units <= cache.pools[pool, Pool.CAPACITY]:
                seen[expert] = 1
                taken[pool] += units
                cache.scratch_int[Scratch.SELECTED, count] = expert
                count += 1
        if len(taken) == 1 and taken[0] + smallest > cache.pools[0, Pool.CAPACITY]:
            break
    return count
