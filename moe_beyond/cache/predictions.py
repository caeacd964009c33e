"""Scores that become available while a step runs, and the prefetches that follow from them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Ints, PolicyHooks, Scratch
from moe_beyond.cache.prefetch_queue import clear_prefetch_queue, enqueue_prefetch
from moe_beyond.cache.prefetchers._dispatch import select
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings


@jit
def newly_available(lookaheads: Ints, index: int, layer: int, layers: int, first_step: bool) -> tuple[int, int]:
    """Return the layers whose scores a lookahead makes available after a layer, or at a step's start (layer -1).

    Lookahead h gives the scores of layer l after layer l - h. If there is no such layer, it gives them at the step's
    start; among several such lookaheads the smallest is used. Lookahead L + 1 gives the scores of a layer's next run
    after the layer, and at the start of the first step those of the first run.

    Args:
        lookaheads: Lookaheads in layers, ascending, ``(H,)`` int64: L for ``"token"``, L + 1 for ``"next"``.
        index: Index of the lookahead.
        layer: Layer that has run, or -1.
        layers: Number of layers L.
        first_step: Whether the step is the first of its sequence.

    Returns:
        The first layer, and the layer after the last.
    """
    lookahead = lookaheads[index]
    if layer < 0:
        if lookahead > layers and not first_step:
            return 0, 0  # available since the step before
        return (lookaheads[index - 1] if index > 0 else 0), min(lookahead, layers)
    if lookahead > layers:
        return layer, layer + 1
    if lookahead == 0 or layer + lookahead >= layers:
        return 0, 0
    return layer + lookahead, layer + lookahead + 1


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
    cache: CacheState, policy: Any, hooks: PolicyHooks, settings: PrefetchSettings, future: FutureView, layer: int
) -> None:
    """Queue the experts that the prefetcher selects after a layer, or at a step's start (layer -1)."""
    count = select(cache, settings, future, layer)
    if settings.replaces_queue:
        clear_prefetch_queue(cache)
    if count > 0:
        enqueue_prefetch(cache, policy, hooks, cache.scratch_int[Scratch.SELECTED, :count])
