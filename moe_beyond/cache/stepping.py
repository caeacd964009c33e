"""Compiled functions behind `moe_beyond.cache.cache.Cache`, whose events happen while a program runs.

If transfers take no time, queued prefetches begin as in a replay: before an event, and before and after the end of its
waves. Otherwise the program begins each of them, when its interconnect is idle, and reports its arrival.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit, jit_apart, jit_entry
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, PolicyHooks, Pool, Scratch, start_step, unpin
from moe_beyond.cache.events import demand, transfer_wave
from moe_beyond.cache.interconnect import Seconds, Tally, is_instant
from moe_beyond.cache.predictions import issue_prefetches, publish
from moe_beyond.cache.prefetch_queue import advance, begin_first
from moe_beyond.cache.prefetchers._inputs import FutureView, PrefetchSettings


@jit
def _set_time(cache: CacheState, now: float) -> None:
    seconds = cache.link.seconds
    seconds[Seconds.NOW] = max(seconds[Seconds.NOW], now)


@jit_apart
def _begin_instant(cache: CacheState, policy: Any, hooks: PolicyHooks) -> None:
    """Begin the queued prefetches that have room, if transfers take no time."""
    if cache.link.tally[Tally.QUEUED] > 0 and is_instant(cache.link):
        advance(cache, policy, hooks, cache.link.seconds[Seconds.NOW])


@jit_entry
def begin_step(cache: CacheState, counted: bool) -> None:
    """Begin a step, as `start_step` does."""
    start_step(cache, counted)


@jit
def slot_of(cache: CacheState, expert: int) -> int:
    """Return the number of an expert's slot over all pools, -1 if it has none."""
    place = cache.experts[Expert.PLACE, expert]
    return cache.pools[cache.experts[Expert.POOL, expert], Pool.FIRST] + place if place >= 0 else -1


@jit_entry
def begin_event(
    cache: CacheState, policy: Any, hooks: PolicyHooks, layer: int, experts: Ints, tokens: Ints, now: float
) -> bool:
    """Begin an event at a time in seconds.

    Returns:
        Whether the arguments are valid; otherwise nothing has changed.
    """
    layers = len(cache.counters)
    size = cache.experts.shape[1] // layers
    if layer < 0 or layer >= layers or len(tokens) != len(experts):
        return False
    before = layer * size - 1
    for expert in experts:
        if expert <= before or expert >= (layer + 1) * size:
            return False
        before = expert
    _set_time(cache, now)
    _begin_instant(cache, policy, hooks)
    seconds = cache.link.seconds  # at most one prefetch is in transit, and all demand of earlier events has arrived
    seconds[Seconds.FREE] = min(seconds[Seconds.FREE], seconds[Seconds.NOW] + seconds[Seconds.TRANSFER])
    demand(cache, policy, hooks, layer, experts, tokens)
    return True


@jit_entry
def next_wave(
    cache: CacheState, policy: Any, hooks: PolicyHooks, future: FutureView, experts: Ints, now: float, wave: Ints
) -> tuple[int, int, int]:
    """Begin the next wave of the event, after the end of the running one if there is one.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        future: Demand of all events; its ``event`` advances with the last wave.
        experts: Demanded experts of the event, ``(n,)`` int64, ascending.
        now: Time in seconds.
        wave: Output, ``(4, n)`` int64: experts of the wave, their slots, the indices of those to transfer, and the
            experts that the host computes, which come with the first wave.

    Returns:
        Number of experts of the wave, -1 if the event is over; the number to transfer; and the number on the host.
    """
    clock = cache.clock
    _set_time(cache, now)
    first = clock[Clock.WAVE] == 0
    if not first:
        _begin_instant(cache, policy, hooks)
        unpin(cache, experts)
        if clock[Clock.MOVED] == clock[Clock.MISSING]:
            _begin_instant(cache, policy, hooks)
            return -1, 0, 0
    begin = clock[Clock.MOVED]
    transfer_wave(cache, policy, hooks, now)
    end = clock[Clock.MOVED]
    if end == clock[Clock.MISSING]:
        future.event[0] += 1
    count = moved = passed = hosted = 0
    for expert in experts:
        if hosted < clock[Clock.ON_HOST] and cache.scratch_int[Scratch.ON_HOST, hosted] == expert:
            wave[3, hosted] = expert
            hosted += 1
            continue
        missed = passed < clock[Clock.MISSING] and cache.scratch_int[Scratch.MISSING, passed] == expert
        if (begin <= passed < end) if missed else first:
            wave[0, count], wave[1, count] = expert, slot_of(cache, expert)
            if missed:
                cache.link.arrives[expert] = -np.inf  # its event waits for it
                wave[2, moved] = count
                moved += 1
            count += 1
        passed += missed
    return count, moved, hosted if first else 0


@jit_entry
def publish_rows(
    cache: CacheState, policy: Any, hooks: PolicyHooks, scores: npt.NDArray[np.float32], layers: Ints
) -> int:
    """Make the scores of layers available, in the given order.

    Args:
        cache: Cache to step.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        scores: Scores of all layers, ``(L, E)`` float32; a row that begins with NaN has no scores.
        layers: Layers, ``(n,)`` int64.

    Returns:
        First layer whose scores are no probabilities, or that does not exist; -1 for none. If there is one, no scores
        have become available.
    """
    for layer in layers:
        if layer < 0 or layer >= len(scores):
            return layer
        if not np.isnan(scores[layer, 0]):
            for score in scores[layer]:
                if not 0 <= score <= 1:
                    return layer
    for layer in layers:
        publish(cache, policy, hooks, scores[layer], layer)
    return -1


@jit_entry
def queue_prefetches(
    cache: CacheState,
    policy: Any,
    hooks: PolicyHooks,
    settings: PrefetchSettings,
    future: FutureView,
    layer: int,
    computed: bool,
) -> None:
    """Queue the experts that the prefetcher selects, as `issue_prefetches` does."""
    issue_prefetches(cache, policy, hooks, settings, future, layer, computed)


@jit_entry
def begin_prefetch(cache: CacheState, policy: Any, hooks: PolicyHooks, now: float) -> tuple[int, int]:
    """Begin the first queued prefetch whose pool has room, on an idle interconnect.

    Returns:
        Its expert, -1 for none, and its slot.
    """
    _set_time(cache, now)
    seconds = cache.link.seconds
    seconds[Seconds.FREE] = min(seconds[Seconds.FREE], seconds[Seconds.NOW])
    expert = begin_first(cache, policy, hooks)
    if expert < 0:
        return -1, -1
    if not is_instant(cache.link):
        cache.link.arrives[expert] = np.inf
    return expert, slot_of(cache, expert)
