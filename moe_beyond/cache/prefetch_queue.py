"""The queue of prefetches and fills: its order, and the beginning of their transfers.

Time passes in `advance`. Without a device a transfer takes no time: a prefetched expert becomes resident immediately if
its pool has room.

A queued prefetch counts as a use when its transfer begins. A prefetch whose pool has no room is overtaken by later
ones. An expert in transit may be evicted after the next event has begun; its transfer is counted as wasted.

A fill is an expert that the host has computed. Fills wait behind all prefetches, in the order of their events. They
begin, count and expire as prefetches do.
"""

from typing import Any

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import (
    CacheState,
    Clock,
    Expert,
    Ints,
    Origin,
    PolicyHooks,
    Pool,
    enter,
    pin,
    replace,
    units_of,
)
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.interconnect import LinkState, Queue, Seconds, Tally, Waits, begins_at, is_instant, send


@jit
def drop_layer_prefetches(cache: CacheState, layer: int) -> None:
    """Cancel the layer's queued prefetches and fills: its demand has arrived."""
    link, kept = cache.link, 0
    for i in range(link.tally[Tally.QUEUED]):
        expert = link.queue[Queue.ORDER, i]
        if cache.experts[Expert.LAYER, expert] == layer:
            link.queue[Queue.WAITS, expert] = Waits.NO
        else:
            link.queue[Queue.ORDER, kept] = expert
            kept += 1
    link.tally[Tally.QUEUED] = kept


@jit
def clear_prefetch_queue(cache: CacheState) -> None:
    """Cancel all prefetches whose transfer has not begun; fills stay."""
    link, kept = cache.link, 0
    for i in range(link.tally[Tally.QUEUED]):
        expert = link.queue[Queue.ORDER, i]
        if link.queue[Queue.WAITS, expert] == Waits.FILL:
            link.queue[Queue.ORDER, kept] = expert
            kept += 1
        else:
            link.queue[Queue.WAITS, expert] = Waits.NO
    link.tally[Tally.QUEUED] = kept


@jit
def _insert_prefetch(link: LinkState, expert: int) -> None:
    """Queue an expert behind all prefetches and before all fills."""
    place = link.tally[Tally.QUEUED]
    while place > 0 and link.queue[Queue.WAITS, link.queue[Queue.ORDER, place - 1]] == Waits.FILL:
        link.queue[Queue.ORDER, place] = link.queue[Queue.ORDER, place - 1]
        place -= 1
    link.queue[Queue.ORDER, place] = expert
    link.queue[Queue.WAITS, expert] = Waits.PREFETCH
    link.tally[Tally.QUEUED] += 1


@jit
def _drop(link: LinkState, expert: int) -> None:
    """Take an expert that waits out of the queue."""
    found = False
    link.queue[Queue.WAITS, expert] = Waits.NO
    link.tally[Tally.QUEUED] -= 1
    for i in range(link.tally[Tally.QUEUED]):
        found |= link.queue[Queue.ORDER, i] == expert
        if found:
            link.queue[Queue.ORDER, i] = link.queue[Queue.ORDER, i + 1]


@jit
def enqueue_fill(cache: CacheState, expert: int) -> None:
    """Queue the transfer of an expert that the host computes; its layer's earlier entries have been cancelled."""
    link = cache.link
    link.queue[Queue.ORDER, link.tally[Tally.QUEUED]] = expert
    link.queue[Queue.WAITS, expert] = Waits.FILL
    link.tally[Tally.QUEUED] += 1


@jit
def enqueue_prefetch(cache: CacheState, policy: Any, hooks: PolicyHooks, selected: Ints) -> None:
    """Queue the transfer of experts ahead of their event, behind the prefetches that are queued already.

    They evict neither the experts that compute now nor those prefetched since the current event began. A resident among
    them is pinned and counts as used, because it is expected to be demanded.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        selected: Distinct experts, the most urgent first, ``(m,)`` int64.
    """
    if len(selected) == 0:
        return
    link = cache.link
    cache.clock[Clock.TIME] += 1
    for expert in selected:
        if cache.experts[Expert.PLACE, expert] >= 0:
            pin(cache, expert)
            cache.experts[Expert.LAST_USE, expert] = cache.clock[Clock.TIME]
            hooks.on_hit(policy, cache, expert)
        elif link.queue[Queue.WAITS, expert] != Waits.PREFETCH:
            if link.queue[Queue.WAITS, expert] == Waits.FILL:
                _drop(link, expert)
            _insert_prefetch(link, expert)
    advance(cache, policy, hooks, link.seconds[Seconds.NOW])


@jit
def advance(cache: CacheState, policy: Any, hooks: PolicyHooks, until: float) -> None:
    """Let time pass; queued prefetches begin one by one while their way is free and their pool has room.

    The way of an expert begins with flash, or with the interconnect if host memory holds the expert.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        until: Time at the end, in seconds of the interconnect.
    """
    link = cache.link
    since, kept = link.seconds[Seconds.NOW], 0
    link.seconds[Seconds.NOW] = until
    for i in range(link.tally[Tally.QUEUED]):
        expert = link.queue[Queue.ORDER, i]
        in_time = begins_at(link, expert, since) < until or is_instant(link)
        if not in_time or not leaves_queue(cache, policy, hooks, expert, since):
            link.queue[Queue.ORDER, kept] = expert
            kept += 1
    link.tally[Tally.QUEUED] = kept


@jit
def begin_first(cache: CacheState, policy: Any, hooks: PolicyHooks) -> int:
    """Begin the first queued prefetch whose pool has room.

    Returns:
        Expert whose transfer begins, -1 for none.
    """
    link = cache.link
    first, kept = -1, 0
    for i in range(link.tally[Tally.QUEUED]):
        expert = link.queue[Queue.ORDER, i]
        if first >= 0 or not leaves_queue(cache, policy, hooks, expert, link.seconds[Seconds.NOW]):
            link.queue[Queue.ORDER, kept] = expert
            kept += 1
        elif cache.experts[Expert.PLACE, expert] >= 0:
            first = expert
    link.tally[Tally.QUEUED] = kept
    return first


@jit
def leaves_queue(cache: CacheState, policy: Any, hooks: PolicyHooks, expert: int, since: float) -> bool:
    """Begin a queued prefetch if its pool has room, unless the policy does not admit it in place of its first victim.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        expert: Expert in the queue.
        since: Earliest start of the transfer, in seconds of the interconnect.

    Returns:
        Whether the prefetch leaves the queue, because its transfer begins or because it is not admitted.
    """
    pool = cache.experts[Expert.POOL, expert]
    units = units_of(cache, expert)
    if cache.pools[pool, Pool.CAPACITY] - cache.pools[pool, Pool.PINNED] < units:
        return False
    counted = cache.clock[Clock.COUNTED] == 1
    origin = Origin.PREFETCHED if counted else Origin.PREFETCHED_UNCOUNTED
    if cache.pools[pool, Pool.FREE] < units:
        victim = hooks.victim(policy, cache, pool)
        if cache.clock[Clock.FORCED] == 0 and not hooks.admit(policy, cache, expert, victim):
            cache.link.queue[Queue.WAITS, expert] = Waits.NO
            return True
        replace(cache, policy, hooks, victim, expert, origin)
    else:
        enter(cache, policy, hooks, expert, origin)
    pin(cache, expert)
    send(cache.link, expert, since, True)
    if counted:
        cache.counters[cache.experts[Expert.LAYER, expert], Counter.PREFETCH_TRANSFERS] += 1
    return True


@jit
def finish(cache: CacheState) -> None:
    """End a sequence: prefetched experts that were never demanded count as wasted."""
    for expert in range(cache.experts.shape[1]):
        if cache.experts[Expert.PLACE, expert] >= 0 and cache.experts[Expert.ORIGIN, expert] == Origin.PREFETCHED:
            cache.counters[cache.experts[Expert.LAYER, expert], Counter.WASTED_PREFETCHES] += 1
            cache.experts[Expert.ORIGIN, expert] = Origin.PREFETCHED_UNCOUNTED
    cache.link.queue[Queue.WAITS] = Waits.NO
    cache.link.tally[Tally.QUEUED] = 0
