"""adaptive: as many as the link can bring in before they are needed, best first.

Of every layer whose scores are known its best 2K experts are candidates. The best-scored of all is taken if it, and all
that was taken before, can cross the link before its layer is routed; then the next. Each is a job with a deadline and a
worth, and to take the best that still fits is the optimum for jobs of one length. They go in the order of their layers.
"""

import numpy as np

from moe_beyond.cache.core import IN_LAYER, LAYER, MARKED, NAMED, ORDER, PLACE, CacheState, Ints
from moe_beyond.cache.interconnect import FREE, NOW, duration
from moe_beyond.cache.jit import jit
from moe_beyond.cache.prefetchers import scored
from moe_beyond.cache.prefetchers.settings import Outlook, Plan


@jit
def names(cache: CacheState, plan: Plan, outlook: Outlook) -> int:
    """Name experts, the soonest needed first; residents among a layer's best K too, which shields them.

    Returns:
        How many.
    """
    layers, first = len(cache.counters), cache.now[LAYER] + 1
    size = cache.experts.shape[1] // layers
    end = 0
    for layer in range(first, layers):
        if not np.isnan(cache.known[layer * size]):
            begin, best = end, scored.names(cache, plan, layer, end)
            for i in range(begin, best):
                expert = cache.room[NAMED, i]
                if cache.experts[PLACE, expert] < 0 or i - begin < plan.top_k:
                    cache.room[NAMED, end] = expert
                    end += 1
    order, taken = cache.room[ORDER, :end], cache.room[MARKED, :end]
    _sort_by_score(cache, order)
    free = max(cache.link.clock[FREE], cache.link.clock[NOW])
    done = cache.weights[:layers]  # when the link is done with what was taken for layers up to each
    done[:] = free
    for i in order:
        expert = cache.room[NAMED, i]
        taken[i] = 1
        if cache.experts[PLACE, expert] < 0:
            layer, takes = cache.experts[IN_LAYER, expert], duration(cache.link, expert)
            fits = done[layer] + takes <= outlook.need[layer]
            for later in range(layer + 1, layers):
                fits &= done[later] == free or done[later] + takes <= outlook.need[later]
            taken[i] = fits
            if fits:
                for later in range(layer, layers):
                    done[later] += takes
    kept = 0
    for i in range(end):
        if taken[i]:
            cache.room[NAMED, kept] = cache.room[NAMED, i]
            kept += 1
    return kept


@jit
def _sort_by_score(cache: CacheState, order: Ints) -> None:
    """Fill in the places of what is named from the best-scored on, ties in their order; by insertion: they are few."""
    for i in range(len(order)):
        score, place = cache.known[cache.room[NAMED, i]], i
        while place > 0 and cache.known[cache.room[NAMED, order[place - 1]]] < score:
            order[place] = order[place - 1]
            place -= 1
        order[place] = i
