"""top<m> and p><t>: the best-scored experts of a layer, at most m of them, and only those of a score above t."""

from moe_beyond.cache.core import NAMED, CacheState
from moe_beyond.cache.jit import jit
from moe_beyond.cache.prefetchers.plan import Plan


@jit
def names(cache: CacheState, plan: Plan, layer: int, begin: int) -> int:
    """Name experts of a layer, best first, ties by the lower id; none where no score is known.

    Args:
        cache: The cache; names go into ``cache.room[NAMED]`` from ``begin`` on.
        plan: The prefetcher.
        layer: Which.
        begin: Where.

    Returns:
        Where the names end.
    """
    size = cache.experts.shape[1] // len(cache.counters)
    first, end = layer * size, begin
    most = begin + min(plan.most, size)
    known, named = cache.known, cache.room[NAMED]
    scores = known[first : first + size]
    for i in range(size):
        score = scores[i]
        if not score > plan.threshold or (end == most and score <= known[named[end - 1]]):
            continue
        place = end if end < most else end - 1  # the last makes way
        while place > begin and known[named[place - 1]] < score:
            named[place] = named[place - 1]
            place -= 1
        named[place] = first + i
        if end < most:
            end += 1
    return end
