"""The compiled loop over a sequence: the order of events, scores and prefetches, step by step and layer by layer."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import (
    CacheState,
    Clock,
    Expert,
    Floats,
    Ints,
    Origin,
    PolicyHooks,
    Pool,
    Scratch,
    advance,
    clear_prefetch_queue,
    demand,
    enqueue_prefetch,
    enter,
    start_step,
    transfer_missing,
    unpin,
    unsigned,
)
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.interconnect import Seconds, Tally, is_instant
from moe_beyond.cache.prefetchers import PrefetcherId, scored
from moe_beyond.cache.prefetchers._dispatch import select
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings
from moe_beyond.cache.steps import StepArrays, Timing


@jit
def _publish(cache: CacheState, policy: Any, hooks: PolicyHooks, scores: npt.NDArray[np.float32], layer: int) -> None:
    """Make a layer's scores ``(E,)`` available."""
    if np.isnan(scores[0]):
        return
    available = cache.scores[layer * len(scores) : (layer + 1) * len(scores)]
    for expert in range(len(scores)):
        available[expert] = scores[expert]
    hooks.on_scores(policy, cache, layer)


@jit
def _publish_scores(
    cache: CacheState, policy: Any, hooks: PolicyHooks, steps: StepArrays, step: int, layer: int
) -> None:
    """Make the scores available that follow a layer, or a step's start (layer -1).

    A slice of lookahead h gives the scores of layer l after layer l - h. If there is no such layer, it gives them at
    the step's start; among several such slices the smallest lookahead is used. A slice of lookahead L + 1 gives the
    scores of a layer's next run after the layer.
    """
    layers = len(cache.counters)
    for i in range(len(steps.lookaheads) - 1, -1, -1):
        lookahead = steps.lookaheads[i]
        if lookahead > layers and step > 0 and layer < 0:
            continue  # available since the step before
        if lookahead > layers and layer >= 0:
            if step + 1 < len(steps.counted):
                _publish(cache, policy, hooks, steps.scores[step + 1, i, layer], layer)
        elif layer >= 0:
            if lookahead > 0 and layer + lookahead < layers:
                _publish(cache, policy, hooks, steps.scores[step, i, layer + lookahead], layer + lookahead)
        else:
            smaller = steps.lookaheads[i - 1] if i > 0 else 0
            for first in range(smaller, min(lookahead, layers)):
                _publish(cache, policy, hooks, steps.scores[step, i, first], first)


@jit
def _set_deadlines(future: FutureView, settings: PrefetchSettings, timing: Timing, ends: float, layer: int) -> None:
    """Set the times at which later layers will be routed if this layer ends at ``ends`` and nothing stalls."""
    if settings.reads_deadlines:
        for later in range(layer + 1, len(future.deadline)):
            ahead = later - layer
            future.deadline[later] = ends + ahead * timing.other + (ahead - 1) * settings.top_k * timing.expert


@jit
def _issue_prefetches(
    cache: CacheState, policy: Any, hooks: PolicyHooks, settings: PrefetchSettings, future: FutureView, layer: int
) -> None:
    """Queue the experts that the prefetcher selects after a layer, or at a step's start (layer -1)."""
    count = select(cache, settings, future, layer)
    if settings.replaces_queue:
        clear_prefetch_queue(cache)
    if count > 0:
        enqueue_prefetch(cache, policy, hooks, cache.scratch_int[Scratch.SELECTED, :count])


@jit
def run_events(
    cache: CacheState,
    policy: Any,
    hooks: PolicyHooks,
    settings: PrefetchSettings,
    steps: StepArrays,
    timing: Timing,
    future: FutureView,
    stall_compute: Floats,
    event_times: Floats,
) -> None:
    """Step a sequence event by event.

    Args:
        cache: Cache, which continues from its present state.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        settings: Settings of the prefetcher.
        steps: Sequence as arrays.
        timing: Seconds of computing.
        future: Demand of this sequence (and of others if the cache is carried over); its ``event`` advances.
        stall_compute: Output, ``(S, 2)`` float64: each step's seconds of stall and of computing.
        event_times: Output, ``(events, 3)`` float64 or empty: times at which each event was routed, had all its
            experts, and ended.
    """
    layers = len(cache.counters)
    link = cache.link
    event = 0
    cache.clock[Clock.FORCED] = settings.knows_future
    for step in range(len(steps.counted)):
        begins = link.seconds[Seconds.NOW]
        start_step(cache, steps.counted[step])
        _set_deadlines(future, settings, timing, begins, -1)
        _publish_scores(cache, policy, hooks, steps, step, -1)
        _issue_prefetches(cache, policy, hooks, settings, future, -1)
        for layer in range(layers):
            experts = steps.ids[steps.offsets[event] : steps.offsets[event + 1]]
            tokens = steps.tokens[steps.offsets[event] : steps.offsets[event + 1]]
            advance(cache, policy, hooks, link.seconds[Seconds.NOW] + timing.other)
            if len(steps.lookaheads) > 0 and steps.lookaheads[0] == 0:
                _publish(cache, policy, hooks, steps.scores[step, 0, layer], layer)
                if (
                    settings.prefetcher == PrefetcherId.SCORED
                    and settings.distance == 0
                    and (layer > 0 or settings.first_layers)
                ):
                    count = scored.best_of_layer(cache, settings, layer, 0)
                    enqueue_prefetch(cache, policy, hooks, cache.scratch_int[Scratch.SELECTED, :count])
            routed_at = link.seconds[Seconds.NOW]
            ready = demand(cache, policy, hooks, layer, experts, tokens)
            if not steps.computed:
                _publish_scores(cache, policy, hooks, steps, step, layer)
            ready = transfer_missing(cache, policy, hooks, experts, ready)
            future.event[0] += 1
            ends = ready + timing.expert * len(experts)
            _set_deadlines(future, settings, timing, ends, layer)
            if not steps.computed:
                _issue_prefetches(cache, policy, hooks, settings, future, layer)
            advance(cache, policy, hooks, ends)
            unpin(cache, experts)
            if link.tally[Tally.QUEUED] > 0 and is_instant(link):  # prefetches without room during the computing
                advance(cache, policy, hooks, ends)
            if steps.computed:
                _publish_scores(cache, policy, hooks, steps, step, layer)
                _issue_prefetches(cache, policy, hooks, settings, future, layer)
            stall_compute[step, 0] += ready - routed_at
            if event < len(event_times):
                event_times[event, 0], event_times[event, 1], event_times[event, 2] = routed_at, ready, ends
            event += 1
        stall_compute[step, 1] = link.seconds[Seconds.NOW] - begins - stall_compute[step, 0]


@jit
def run_accesses(
    cache: CacheState, policy: Any, hooks: PolicyHooks, ids: Ints, ends: Ints, counted: npt.NDArray[np.bool_]
) -> None:
    """Step a stream access by access, as other simulators do: no events, no prefetches, no time.

    Args:
        cache: Cache, which continues from its present state.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        ids: Experts in the order of access, ``(n,)`` int64.
        ends: Number of accesses up to the end of each step, ``(S,)`` int64.
        counted: Whether each step counts, ``(S,)`` bool.
    """
    clock, experts, counters = cache.clock, cache.experts, cache.counters
    size, pooled = experts.shape[1] // len(counters), len(cache.pools) > 1
    begins = layer = free_slots = 0
    pool = unsigned(0)
    first = beyond = 0  # range of the current layer's ids
    hits = accesses = 0
    event, ahead = clock[Clock.EVENT], clock[Clock.TIME] - clock[Clock.EVENT]
    for step in range(len(ends)):
        start_step(cache, counted[step])
        for i in range(begins, ends[step]):
            expert = unsigned(ids[i])
            if expert < first or expert >= beyond:
                if counted[step]:
                    _count(counters, layer, accesses, hits)
                hits = accesses = 0
                layer = int(expert) // size
                first, beyond = layer * size, (layer + 1) * size
                pool = unsigned(layer if pooled else 0)
                free_slots = cache.pools[pool, Pool.CAPACITY] - cache.pools[pool, Pool.USED]
                clock[Clock.LAYER] = layer
            accesses += 1
            event += 1
            clock[Clock.EVENT], clock[Clock.TIME] = event, event + ahead
            if experts[Expert.PLACE, expert] >= 0:
                hits += 1
                experts[Expert.LAST_USE, expert] = event + ahead
                hooks.on_hit(policy, cache, expert)
                continue
            if free_slots > 0:
                enter(cache, policy, hooks, expert, Origin.DEMANDED)
                free_slots -= 1
                continue
            victim = unsigned(hooks.victim(policy, cache, pool))
            if not hooks.bypass or hooks.admit(
                policy, cache, expert, victim
            ):  # without prefetches origins do not change
                place = unsigned(experts[Expert.PLACE, victim])
                experts[Expert.PLACE, victim] = -1
                hooks.on_evict(policy, cache, victim)
                cache.residents[pool, place] = expert
                experts[Expert.PLACE, expert] = place
                experts[Expert.LAST_USE, expert] = event + ahead
                hooks.on_admit(policy, cache, expert)
        if counted[step]:
            _count(counters, layer, accesses, hits)
        hits = accesses = 0
        first = beyond = 0
        begins = ends[step]


@jit
def _count(counters: Ints, layer: int, accesses: int, hits: int) -> None:
    counters[layer, Counter.ACCESSES] += accesses
    counters[layer, Counter.HITS] += hits
    counters[layer, Counter.MISSES] += accesses - hits
    counters[layer, Counter.DEMAND_TRANSFERS] += accesses - hits
