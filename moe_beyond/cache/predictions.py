"""Scores that become available while a step runs, and the prefetches that follow from them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Ints, PolicyHooks, Scratch
from moe_beyond.cache.prefetch_queue import clear_prefetch_queue, enqueue_prefetch
from moe_beyond.cache.prefetchers._dispatch import select
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings
from moe_beyond.cache.prefetchers.scored import scored_at_start
from moe_beyond.cache.steps import Ahead


@jit
def newly_available(
    lookaheads: Ints, index: int, layer: int, computed: bool, layers: int, first_step: bool
) -> tuple[int, int]:
    """Return the layers whose scores a lookahead makes available after a layer, or at a step's start (layer -1).

    Lookahead h gives the scores of layer l once layer l - h is routed, and ``"computed"`` once layer l - 1 is computed.
    If there is no such layer, they give them at the step's start; the first of several such lookaheads is used.
    ``"next"`` gives the scores of a layer's next run once the layer is routed, and at the start of the first step those
    of the first run.

    Args:
        lookaheads: Lookaheads as `moe_beyond.cache.steps.in_layers` numbers them, ascending, ``(H,)`` int64.
        index: Index of the lookahead.
        layer: Layer that is routed or computed, or -1.
        computed: Whether the layer is computed.
        layers: Number of layers L.
        first_step: Whether the step is the first of its sequence.

    Returns:
        The first layer, and the layer after the last.
    """
    lookahead = lookaheads[index]
    if layer < 0:
        if lookahead > layers and not first_step:
            return 0, 0  # available since the step before
        return (scored_at_start(lookaheads[index - 1], layers) if index > 0 else 0), scored_at_start(lookahead, layers)
    if computed != (lookahead == Ahead.COMPUTED) or lookahead == Ahead.ROUTER_INPUT:
        return 0, 0
    if lookahead > layers:
        return layer, layer + 1
    later = layer + max(lookahead, 1)
    return (later, later + 1) if later < layers else (0, 0)


@jit
def prefetch_moments(lookaheads: Ints) -> tuple[bool, bool]:
    """Return whether prefetches are selected once a layer is routed, and whether once it is computed.

    They are selected whenever scores may become available. Without scores they are selected after routing.

    Args:
        lookaheads: Lookaheads as `moe_beyond.cache.steps.in_layers` numbers them, ascending, ``(H,)`` int64.
    """
    computed = False
    for lookahead in lookaheads:
        computed |= lookahead == Ahead.COMPUTED
    return len(lookaheads) == 0 or lookaheads[-1] != Ahead.COMPUTED, computed


@jit
def publish(cache: CacheState, policy: Any, hooks: PolicyHooks, scores: npt.NDArray[np.float32], layer: int) -> None:
    """Make a layer's scores ``(E,)`` available, unless they are NaN."""
    if np.isnan(scores[0]):
        return
    available = cache.scores[layer * len(scores) : (layer + 1) * len(scores)]
    for expert in range(len(scores)):
        available[expert] = scores[expert]
    hooks.on_scores(policy, cache, layer)


@jit
def issue_prefetches(
    cache: CacheState,
    policy: Any,
    hooks: PolicyHooks,
    settings: PrefetchSettings,
    future: FutureView,
    layer: int,
    computed: bool,
) -> None:
    """Queue the experts that the prefetcher selects once a layer is routed or computed, or at a step's start (-1)."""
    count = select(cache, settings, future, layer, computed)
    if settings.replaces_queue:
        clear_prefetch_queue(cache)
    if count > 0:
        enqueue_prefetch(cache, policy, hooks, cache.scratch_int[Scratch.SELECTED, :count])
