"""Events: the demand of a layer, and the waves in which its experts hold slots and compute.

Hits are judged against the residents before the event. All experts of a wave hold slots while they compute, so no
victim comes from the running wave.

An event that demands more experts than its pool has room for runs in several waves. The first holds the demanded
residents and the first missing experts that fill the pool. Each further wave holds the next missing experts, at most
the pool's capacity. A wave is unpinned when it has computed, so the next wave may evict it. Each expert is transferred
once per event.

Experts that the host computes are in no wave. Those without a slot are queued as fills.
"""

from typing import Any

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import (
    CacheState,
    Clock,
    Expert,
    Ints,
    Origin,
    PolicyHooks,
    Pool,
    Scratch,
    enter,
    pin,
    replace,
    units_of,
    unpin_all,
)
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.host_choice import choose_host
from moe_beyond.cache.interconnect import Queue, Seconds, Tally, Waits, send
from moe_beyond.cache.misses import Handling
from moe_beyond.cache.prefetch_queue import drop_layer_prefetches, enqueue_fill


@jit
def demand(cache: CacheState, policy: Any, hooks: PolicyHooks, layer: int, experts: Ints, tokens: Ints) -> float:
    """Begin an event: a layer is routed.

    All accesses are counted. No expert is transferred yet: `transfer_wave` follows after the scores that become
    available with this event.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        layer: Layer of the event.
        experts: Distinct demanded experts of the layer, ascending, ``(n,)`` int64; may be empty.
        tokens: Number of tokens that demand each expert, ``(n,)`` int64.

    Returns:
        Time at which the demanded residents that the device computes have arrived, in seconds of the interconnect.
    """
    link, clock = cache.link, cache.clock
    clock[Clock.EVENT] += 1
    clock[Clock.TIME] += 1
    unpin_all(cache)
    clock[Clock.LAYER] = layer
    row = cache.counters[layer]
    ready = link.seconds[Seconds.NOW]
    handled = clock[Clock.HANDLING] != Handling.MOVE
    if handled:
        choose_host(cache, experts, tokens)
    missing = queued = late = hosted = absent = 0
    for i in range(len(experts)):
        expert = experts[i]
        on_host = handled and cache.scratch_int[Scratch.MARKED, i] == 1
        if on_host:
            cache.scratch_int[Scratch.ON_HOST, hosted] = expert
            hosted += 1
        if cache.experts[Expert.PLACE, expert] < 0:
            if on_host:
                absent += 1
                continue
            cache.scratch_int[Scratch.MISSING, missing] = expert
            missing += 1
            queued += link.queue[Queue.WAITS, expert] == Waits.PREFETCH
            continue
        if link.arrives[expert] > link.seconds[Seconds.NOW]:
            if not on_host:
                ready = max(ready, link.arrives[expert])
            late += 1
        elif cache.experts[Expert.ORIGIN, expert] == Origin.PREFETCHED:
            row[Counter.USEFUL_PREFETCHES] += 1
        cache.experts[Expert.ORIGIN, expert] = Origin.DEMANDED
        cache.experts[Expert.LAST_USE, expert] = clock[Clock.TIME]
        pin(cache, expert)
        hooks.on_hit(policy, cache, expert)
    clock[Clock.HITS], clock[Clock.LATE_HITS] = len(experts) - missing - absent - late, late + queued
    clock[Clock.MISSES], clock[Clock.MISSING] = missing + absent - queued, missing
    clock[Clock.MOVED] = clock[Clock.WAVE] = 0
    clock[Clock.ON_HOST] = hosted
    if clock[Clock.COUNTED] == 1:
        row[Counter.ACCESSES] += len(experts)
        row[Counter.HITS] += clock[Clock.HITS]
        row[Counter.LATE_HITS] += clock[Clock.LATE_HITS]
        row[Counter.MISSES] += clock[Clock.MISSES]
        row[Counter.DEMAND_TRANSFERS] += missing - queued
        row[Counter.PREFETCH_TRANSFERS] += queued
        row[Counter.ON_HOST] += hosted
    if link.tally[Tally.QUEUED] > 0:
        drop_layer_prefetches(cache, layer)
    for expert in cache.scratch_int[Scratch.ON_HOST, :hosted]:
        if cache.experts[Expert.PLACE, expert] < 0:
            enqueue_fill(cache, expert)
    size = cache.experts.shape[1] // len(cache.counters)
    for expert in range(layer * size, (layer + 1) * size):
        cache.scores[expert] = np.nan  # the scores were for this run
    hooks.on_demand(policy, cache, experts, tokens)
    return ready


@jit
def transfer_wave(cache: CacheState, policy: Any, hooks: PolicyHooks, ready: float) -> float:
    """Begin the next wave of the event: transfer its missing experts.

    The caller unpins the experts of the wave before. The event's last wave is running if ``Clock.MOVED`` equals
    ``Clock.MISSING`` afterwards. With a policy that bypasses the cache, there is one wave.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        ready: Time at which the wave's residents have arrived, in seconds of the interconnect.

    Returns:
        Time at which all experts of the wave have arrived, in seconds.
    """
    link, clock = cache.link, cache.clock
    clock[Clock.WAVE] += 1
    begin, end = clock[Clock.MOVED], clock[Clock.MISSING]
    if begin == end:
        return ready
    missing = cache.scratch_int[Scratch.MISSING]
    pool = cache.experts[Expert.POOL, missing[begin]]
    if not hooks.bypass:
        room = cache.pools[pool, Pool.CAPACITY] - cache.pools[pool, Pool.PINNED]
        if clock[Clock.MIXED] == 1:
            room //= cache.experts[Expert.UNITS, missing[begin]]  # a layer's experts have one size
        end = min(end, begin + room)
    clock[Clock.MOVED] = end
    coming = missing[begin:end]
    for expert in coming:
        ready = max(ready, send(link, expert, link.seconds[Seconds.NOW], False))
    if hooks.bypass:
        unpin_all(cache)
        for expert in coming:
            _admit_demanded(cache, policy, hooks, expert)
    else:
        for expert in coming:
            if cache.pools[pool, Pool.FREE] < units_of(cache, expert):
                replace(cache, policy, hooks, hooks.victim(policy, cache, pool), expert, Origin.DEMANDED)
            else:
                enter(cache, policy, hooks, expert, Origin.DEMANDED)
            pin(cache, expert)
    return ready


@jit
def _admit_demanded(cache: CacheState, policy: Any, hooks: PolicyHooks, expert: int) -> None:
    """Admit an expert that bypassed the cache if there is room, or if the policy prefers it to its first victim."""
    pool = cache.experts[Expert.POOL, expert]
    if cache.pools[pool, Pool.FREE] >= units_of(cache, expert):
        enter(cache, policy, hooks, expert, Origin.DEMANDED)
        return
    victim = hooks.victim(policy, cache, pool)
    if hooks.admit(policy, cache, expert, victim):
        replace(cache, policy, hooks, victim, expert, Origin.DEMANDED)
