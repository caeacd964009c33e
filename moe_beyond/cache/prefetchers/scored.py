"""top<m> and p><t>: the best-scored experts of a layer, at most m of them, and only those with a score above t."""

import numpy as np

from moe_beyond.cache.compiler import jit, jit_apart
from moe_beyond.cache.core import CacheState, Scratch, unsigned
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings
from moe_beyond.cache.steps import Ahead

LOWEST_KEY, HIGHEST_KEY = -(2**63), 2**63 - 1


@jit
def scored_at_start(lookahead: int, layers: int) -> int:
    """Return the number of layers whose scores a lookahead makes available when a step starts.

    Args:
        lookahead: Lookahead as `moe_beyond.cache.steps.in_layers` numbers it.
        layers: Number of layers L.
    """
    return 1 if lookahead == Ahead.COMPUTED else max(0, min(lookahead, layers))


@jit
def select(cache: CacheState, settings: PrefetchSettings, future: FutureView, layer: int, computed: bool) -> int:
    """Select experts of the layer at the prefetcher's distance; at a step's start, of all layers nearer than that.

    Returns:
        Number of selected experts.
    """
    layers, count = len(cache.counters), 0
    if layer < 0:
        for first in range(scored_at_start(settings.distance, layers)):
            count = best_of_layer(cache, settings, first, count)
    elif settings.distance != Ahead.ROUTER_INPUT and computed == (settings.distance == Ahead.COMPUTED):
        later = layer + max(settings.distance, 1)
        if later < layers:
            count = best_of_layer(cache, settings, later, 0)
    return count


@jit_apart
def best_of_layer(cache: CacheState, settings: PrefetchSettings, layer: int, begin: int) -> int:
    """Append the best-scored experts of a layer, ties by the lower id; none if no score is available.

    Each selected expert is the best below the previous one, found by a scan over all experts. No branch depends on a
    score, so the compiler vectorises the scan: it is three times as fast as an insertion sort.

    Args:
        cache: Cache; the experts are appended to ``cache.scratch_int[Scratch.SELECTED]``.
        settings: Settings of the prefetcher.
        layer: Layer of the experts.
        begin: Number of experts selected before.

    Returns:
        Number of experts selected in total.
    """
    size = cache.experts.shape[1] // len(cache.counters)
    first = layer * size
    scores = cache.scores[first : first + size]
    if np.isnan(scores[0]):
        return begin
    selected, keys = cache.scratch_int[Scratch.SELECTED], cache.scratch_int[Scratch.ORDER, :size]
    bits = scores.view(np.int32)
    for i in range(size):  # keys are distinct, ordered by score and then by id
        bit = np.int64(bits[i])
        ordered = bit if bit >= 0 else -(bit & 0x7FFFFFFF)
        keys[i] = (ordered << 32) | (size - 1 - i)
    last = HIGHEST_KEY
    for end in range(begin, begin + min(settings.max_experts, size)):
        best = LOWEST_KEY
        for i in range(size):
            key = keys[i]
            best = max(best, key if key < last else LOWEST_KEY)
        expert = unsigned(first + size - 1 - (best & 0xFFFFFFFF))
        if not cache.scores[expert] > settings.threshold:
            return end
        selected[end] = expert
        last = best
    return begin + min(settings.max_experts, size)
