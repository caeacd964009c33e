"""top<m> and p><t>: the best-scored experts of a layer, at most m of them, and only those of a score above t."""

import numpy as np

from moe_beyond.cache.core import NAMED, ORDER, CacheState, unsigned
from moe_beyond.cache.jit import jit_apart
from moe_beyond.cache.prefetchers.settings import Plan

LEAST, MOST = -(2**63), 2**63 - 1


@jit_apart
def names(cache: CacheState, plan: Plan, layer: int, begin: int) -> int:
    """Name experts of a layer, best first, ties by the lower id; none where no score is known.

    Every name is the best below the last, found by looking at all: no branch depends on a score, and the compiler looks
    at several at once. That is three times as fast as sorting in what may be among the best.

    Args:
        cache: The cache; names go into ``cache.room[NAMED]`` from ``begin`` on.
        plan: The prefetcher.
        layer: Which.
        begin: Where.

    Returns:
        Where the names end.
    """
    size = cache.experts.shape[1] // len(cache.counters)
    first = layer * size
    scores = cache.known[first : first + size]
    if np.isnan(scores[0]):
        return begin
    named, keys = cache.room[NAMED], cache.room[ORDER, :size]
    bits = scores.view(np.int32)
    for i in range(size):  # ordered as the scores are, and then by the id: no two are the same
        bit = np.int64(bits[i])
        ordered = bit if bit >= 0 else -(bit & 0x7FFFFFFF)
        keys[i] = (ordered << 32) | (size - 1 - i)
    last = MOST
    for end in range(begin, begin + min(plan.most, size)):
        best = LEAST
        for i in range(size):
            key = keys[i]
            best = max(best, key if key < last else LEAST)
        expert = unsigned(first + size - 1 - (best & 0xFFFFFFFF))
        if not cache.known[expert] > plan.threshold:
            return end
        named[end] = expert
        last = best
    return begin + min(plan.most, size)
