"""Calling a prefetcher by its number: compiled code calls no function that it does not know."""

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState
from moe_beyond.cache.prefetchers import PrefetcherId, adaptive, moe_infinity, oracle, scored
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings


@jit
def select(cache: CacheState, settings: PrefetchSettings, future: FutureView, layer: int, computed: bool) -> int:
    """Select experts once a layer is routed or computed, or at a step's start (layer -1).

    A prefetcher reads only `CacheState.scores`, so it reads no score before its lookahead makes it available.

    Returns:
        Number of experts in ``cache.scratch_int[Scratch.SELECTED]``, the most urgent first.
    """
    if settings.prefetcher == PrefetcherId.NONE or (
        layer < 0 and not settings.first_layers and not settings.knows_future
    ):
        return 0
    if settings.prefetcher == PrefetcherId.ORACLE:
        return oracle.select(cache, settings, future, layer)
    if settings.prefetcher == PrefetcherId.ADAPTIVE:
        return adaptive.select(cache, settings, future, layer)
    if settings.prefetcher == PrefetcherId.MOE_INFINITY:
        return moe_infinity.select(cache, settings, future, layer)
    return scored.select(cache, settings, future, layer, computed)
