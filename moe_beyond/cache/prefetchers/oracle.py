"""oracle: what will be demanded, the soonest first, as much as the cache has room for.

On a link that takes time this is the aggressive strategy of Cao et al. (SIGMETRICS 1995): always bring in what is
missing next, and never for it evict what is needed sooner.
"""

from moe_beyond.cache.core import CAPACITY, MARKED, NAMED, ORDER, POOL, CacheState
from moe_beyond.cache.jit import jit
from moe_beyond.cache.prefetchers.settings import Outlook, Plan


@jit
def names(cache: CacheState, plan: Plan, outlook: Outlook) -> int:
    """Name the next experts of every pool, no more than it has slots, out of as many events as could fill the cache.

    Returns:
        How many.
    """
    horizon = int(cache.pools[:, CAPACITY].sum()) // plan.top_k + 1
    seen, taken = cache.room[ORDER], cache.room[MARKED, : len(cache.pools)]
    seen[:] = 0
    taken[:] = 0
    count, first = 0, outlook.event[0]
    for event in range(first, min(first + horizon, len(outlook.offsets) - 1)):
        for i in range(outlook.offsets[event], outlook.offsets[event + 1]):
            expert = outlook.ids[i]
            pool = cache.experts[POOL, expert]
            if seen[expert] == 0 and taken[pool] < cache.pools[pool, CAPACITY]:
                seen[expert] = 1
                taken[pool] += 1
                cache.room[NAMED, count] = expert
                count += 1
        if len(taken) == 1 and taken[0] == cache.pools[0, CAPACITY]:
            break
    return count
