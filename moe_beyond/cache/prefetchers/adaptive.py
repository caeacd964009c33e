"""adaptive: as many experts as the interconnect transfers before their layer runs, best first.

The candidates are the best 2K experts of every later layer whose scores are available. They are tried in the order of
their scores. A candidate is selected if it and all experts selected so far can cross the interconnect before their
layers are routed. Each candidate is a job with a deadline and a value; selecting the best job that still fits is
optimal for jobs of equal length. The selected experts are transferred in the order of their layers.
"""

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, Scratch
from moe_beyond.cache.interconnect import Seconds, duration
from moe_beyond.cache.prefetchers import scored
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings


@jit
def select(cache: CacheState, settings: PrefetchSettings, future: FutureView, layer: int) -> int:
    """Select experts, the soonest needed first; residents among a layer's best K too, which pins them.

    Returns:
        Number of selected experts.
    """
    layers, first = len(cache.counters), cache.clock[Clock.LAYER] + 1
    size = cache.experts.shape[1] // layers
    selected = cache.scratch_int[Scratch.SELECTED]
    end = 0
    for later in range(first, layers):
        if not np.isnan(cache.scores[later * size]):
            begin, best = end, scored.best_of_layer(cache, settings, later, end)
            for i in range(begin, best):
                expert = selected[i]
                if cache.experts[Expert.PLACE, expert] < 0 or i - begin < settings.top_k:
                    selected[end] = expert
                    end += 1
    order, taken = cache.scratch_int[Scratch.ORDER, :end], cache.scratch_int[Scratch.MARKED, :end]
    _sort_by_score(cache, order)
    free = max(cache.link.seconds[Seconds.FREE], cache.link.seconds[Seconds.NOW])
    done = cache.scratch_float[:layers]  # time at which the transfers for layers up to each one are done
    done[:] = free
    for i in order:
        expert = selected[i]
        taken[i] = 1
        if cache.experts[Expert.PLACE, expert] < 0:
            own, takes = cache.experts[Expert.LAYER, expert], duration(cache.link, expert)
            fits = done[own] + takes <= future.deadline[own]
            for later in range(own + 1, layers):
                fits &= done[later] == free or done[later] + takes <= future.deadline[later]
            taken[i] = fits
            if fits:
                for later in range(own, layers):
                    done[later] += takes
    kept = 0
    for i in range(end):
        if taken[i]:
            selected[kept] = selected[i]
            kept += 1
    return kept


@jit
def _sort_by_score(cache: CacheState, order: Ints) -> None:
    """Fill ``order`` with the indices of the selected experts by falling score, ties by index (insertion sort)."""
    selected = cache.scratch_int[Scratch.SELECTED]
    for i in range(len(order)):
        score, place = cache.scores[selected[i]], i
        while place > 0 and cache.scores[selected[order[place - 1]]] < score:
            order[place] = order[place - 1]
            place -= 1
        order[place] = i
