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
    enter,
    start_step,
    unpin,
    unsigned,
)
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.events import demand, transfer_wave
from moe_beyond.cache.interconnect import Seconds, Tally, computed_at, is_instant
from moe_beyond.cache.predictions import issue_prefetches, newly_available, prefetch_moments, publish
from moe_beyond.cache.prefetch_queue import advance, enqueue_prefetch
from moe_beyond.cache.prefetchers import PrefetcherId, scored
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings
from moe_beyond.cache.steps import Ahead, EventRecord, StepArrays, Timing


@jit
def _publish_scores(
    cache: CacheState, policy: Any, hooks: PolicyHooks, steps: StepArrays, step: int, layer: int, computed: bool
) -> None:
    """Make the scores available that follow a layer's routing or computing, or a step's start (layer -1)."""
    layers = len(cache.counters)
    for i in range(len(steps.lookaheads) - 1, -1, -1):
        source = step + (layer >= 0 and steps.lookaheads[i] > layers)
        if source < len(steps.scores):
            begin, end = newly_available(steps.lookaheads, i, layer, computed, layers, step == 0)
            for later in range(begin, end):
                publish(cache, policy, hooks, steps.scores[source, i, later], later)


@jit
def _set_deadlines(
    future: FutureView, settings: PrefetchSettings, timing: Timing, step: int, ends: float, layer: int
) -> None:
    """Set the times at which later layers will be routed if this layer ends at ``ends`` and nothing stalls."""
    if settings.reads_deadlines:
        for later in range(layer + 1, len(future.deadline)):
            ahead = later - layer
            experts = (ahead - 1) * settings.top_k * timing.expert
            future.deadline[later] = ends + ahead * timing.layer[step] + experts


@jit
def _expert_seconds(timing: Timing, tokens: Ints) -> float:
    """Return the seconds of one expert of an event, given the number of tokens that demand each expert."""
    if timing.token == 0 or len(tokens) == 0:
        return timing.expert
    demanded = 0
    for count in tokens:
        demanded += count
    return max(timing.expert, timing.token * demanded / len(tokens))


@jit
def _wave_ends(cache: CacheState, experts: Ints, begin: int, begins: float, takes: float) -> float:
    """Return the time at which the running wave has computed.

    Args:
        cache: Cache to step.
        experts: Demanded experts of the event, ascending, ``(n,)`` int64.
        begin: Number of missing experts that earlier waves have transferred.
        begins: Time at which the wave begins, in seconds.
        takes: Seconds of computing per expert.
    """
    clock = cache.clock
    if clock[Clock.WAVE] > 1:
        experts = cache.scratch_int[Scratch.MISSING, begin : clock[Clock.MOVED]]
    elif (
        clock[Clock.MOVED] < clock[Clock.MISSING] or clock[Clock.ON_HOST] > 0
    ):  # neither of later waves nor of the host
        held, later, hosted, wave = 0, clock[Clock.MOVED], 0, cache.scratch_int[Scratch.SELECTED]
        for expert in experts:
            if later < clock[Clock.MISSING] and cache.scratch_int[Scratch.MISSING, later] == expert:
                later += 1
            elif hosted < clock[Clock.ON_HOST] and cache.scratch_int[Scratch.ON_HOST, hosted] == expert:
                hosted += 1
            else:
                wave[held] = expert
                held += 1
        experts = wave[:held]
    return computed_at(cache.link, experts, begins, takes)


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
    events: Floats,
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
        events: Output, ``(events, 7)`` float64 or empty, columns `moe_beyond.cache.steps.EventRecord`.
    """
    layers = len(cache.counters)
    link, clock = cache.link, cache.clock
    event = 0
    clock[Clock.FORCED] = settings.knows_future
    after_routing, after_computing = prefetch_moments(steps.lookaheads)
    for step in range(len(steps.counted)):
        begins = link.seconds[Seconds.NOW]
        start_step(cache, steps.counted[step])
        _set_deadlines(future, settings, timing, step, begins, -1)
        _publish_scores(cache, policy, hooks, steps, step, -1, False)
        issue_prefetches(cache, policy, hooks, settings, future, -1, False)
        for layer in range(layers):
            experts = steps.ids[steps.offsets[event] : steps.offsets[event + 1]]
            tokens = steps.tokens[steps.offsets[event] : steps.offsets[event + 1]]
            advance(cache, policy, hooks, link.seconds[Seconds.NOW] + timing.layer[step])
            if len(steps.lookaheads) > 0 and steps.lookaheads[0] == Ahead.ROUTER_INPUT:
                publish(cache, policy, hooks, steps.scores[step, 0, layer], layer)
                if (
                    settings.prefetcher == PrefetcherId.SCORED
                    and settings.distance == Ahead.ROUTER_INPUT
                    and (layer > 0 or settings.first_layers)
                ):
                    count = scored.best_of_layer(cache, settings, layer, 0)
                    enqueue_prefetch(cache, policy, hooks, cache.scratch_int[Scratch.SELECTED, :count])
            routed_at, per_expert = link.seconds[Seconds.NOW], _expert_seconds(timing, tokens)
            link.seconds[Seconds.COMPUTE] = per_expert
            ready = demand(cache, policy, hooks, layer, experts, tokens)
            _publish_scores(cache, policy, hooks, steps, step, layer, False)
            waits_for, in_all, stall = len(experts) - clock[Clock.ON_HOST], 0.0, 0.0
            while True:  # one wave of the event after another
                now, moved = link.seconds[Seconds.NOW], clock[Clock.MOVED]
                ready = transfer_wave(cache, policy, hooks, ready)
                later = clock[Clock.MISSING] - clock[Clock.MOVED]
                computing = per_expert * (waits_for - later)
                ends = now + computing
                if ready > now:
                    in_turn = per_expert * timing.overlap
                    ends = _wave_ends(cache, experts, moved, now, in_turn) + (per_expert - in_turn) * (
                        waits_for - later
                    )
                stall += max(0.0, ends - (now + computing))  # 0 but for rounding
                waits_for = later
                in_all += computing
                if later == 0:
                    if clock[Clock.ON_HOST] > 0:
                        ends = max(ends, link.seconds[Seconds.HOST_FREE])
                        stall = max(0.0, ends - max(routed_at + in_all, link.seconds[Seconds.HOST_FREE]))
                    future.event[0] += 1
                    _set_deadlines(future, settings, timing, step, ends, layer)
                    if after_routing:
                        issue_prefetches(cache, policy, hooks, settings, future, layer, False)
                advance(cache, policy, hooks, ends)
                unpin(cache, experts)
                if later == 0:
                    break
                ready = ends
            stall_compute[step, 0] += stall
            if link.tally[Tally.QUEUED] > 0 and is_instant(link):  # prefetches without room during the computing
                advance(cache, policy, hooks, ends)
            if after_computing:
                _publish_scores(cache, policy, hooks, steps, step, layer, True)
                issue_prefetches(cache, policy, hooks, settings, future, layer, True)
            if event < len(events):
                record = events[event]
                record[EventRecord.ROUTED], record[EventRecord.READY] = routed_at, ready
                record[EventRecord.ENDED], record[EventRecord.HITS] = ends, clock[Clock.HITS]
                record[EventRecord.LATE_HITS] = clock[Clock.LATE_HITS]
                record[EventRecord.MISSES], record[EventRecord.STALL] = clock[Clock.MISSES], stall
            event += 1
        if timing.outside[step] > 0:
            advance(cache, policy, hooks, link.seconds[Seconds.NOW] + timing.outside[step])
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
