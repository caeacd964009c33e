"""moe_infinity: MoE-Infinity's queue (arXiv 2401.14361): later layers' experts by (p + epsilon) * (1 - ahead/L).

Every event replaces the queue, so experts whose transfer has not begun get a new priority. If transfers take time, the
interconnect limits the number of transfers; otherwise K transfers per event do.
"""

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Scratch
from moe_beyond.cache.interconnect import Seconds, is_instant
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings

EPSILON = 1e-8
MAX_SELECTED = 64


@jit
def select(cache: CacheState, settings: PrefetchSettings, future: FutureView, layer: int) -> int:
    """Select experts that are not resident, the highest priority first.

    Returns:
        Number of selected experts.
    """
    layers, current = len(cache.counters), cache.clock[Clock.LAYER]
    size = cache.experts.shape[1] // layers
    limit = settings.max_experts
    if not is_instant(cache.link) and current + 1 < layers:  # transfers that can begin before the next event
        gap = future.deadline[current + 1] - max(cache.link.seconds[Seconds.FREE], cache.link.seconds[Seconds.NOW])
        limit = min(int(max(gap, 0.0) / cache.link.seconds[Seconds.TRANSFER]) + settings.max_experts, MAX_SELECTED)
    priority = cache.scratch_float
    priority[:] = -1.0
    for expert in range((current + 1) * size, cache.experts.shape[1]):
        if cache.experts[Expert.PLACE, expert] < 0 and not np.isnan(cache.scores[expert]):
            ahead = cache.experts[Expert.LAYER, expert] - current
            priority[expert] = (cache.scores[expert] + EPSILON) * (1 - ahead / layers)
    for rank in range(limit):
        best, highest = -1, -1.0
        for expert in range(len(priority)):
            if priority[expert] > highest:
                best, highest = expert, priority[expert]
        if best < 0:
            return rank
        cache.scratch_int[Scratch.SELECTED, rank] = best
        priority[best] = -1.0
    return limit
