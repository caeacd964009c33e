"""moe_infinity: MoE-Infinity's queue (arXiv 2401.14361): all later layers' experts by (p + epsilon) * (1 - ahead/L).

It is made anew at every event, so that what has not gone on the link is put in its place again. Where transfers take
time, the link limits what is brought in; where they take none, K transfers an event do.
"""

import numpy as np

from moe_beyond.cache.core import IN_LAYER, LAYER, NAMED, PLACE, CacheState
from moe_beyond.cache.interconnect import FREE, NOW, TRANSFER, is_instant
from moe_beyond.cache.jit import jit
from moe_beyond.cache.prefetchers.settings import Outlook, Plan

EPSILON = 1e-8
MOST = 64


@jit
def names(cache: CacheState, plan: Plan, outlook: Outlook) -> int:
    """Name experts that are not resident, of the highest priority first; return how many."""
    layers, current = len(cache.counters), cache.now[LAYER]
    size = cache.experts.shape[1] // layers
    room = plan.most
    if not is_instant(cache.link) and current + 1 < layers:  # what can begin before the next event asks anew
        gap = outlook.need[current + 1] - max(cache.link.clock[FREE], cache.link.clock[NOW])
        room = min(int(max(gap, 0.0) / cache.link.clock[TRANSFER]) + plan.most, MOST)
    priority = cache.weights
    priority[:] = -1.0
    for expert in range((current + 1) * size, cache.experts.shape[1]):
        if cache.experts[PLACE, expert] < 0 and not np.isnan(cache.known[expert]):
            ahead = cache.experts[IN_LAYER, expert] - current
            priority[expert] = (cache.known[expert] + EPSILON) * (1 - ahead / layers)
    for rank in range(room):
        best, highest = -1, -1.0
        for expert in range(len(priority)):
            if priority[expert] > highest:
                best, highest = expert, priority[expert]
        if best < 0:
            return rank
        cache.room[NAMED, rank] = best
        priority[best] = -1.0
    return room
