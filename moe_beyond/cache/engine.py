"""Stepping a sequence: what happens when, token by token and layer by layer."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.core import (
    ACCESSES,
    CAPACITY,
    DEMAND_TRANSFERS,
    DEMANDED,
    EVENT,
    HITS,
    INSIST,
    LAST,
    LAYER,
    MISSES,
    MOMENT,
    NAMED,
    PLACE,
    USED,
    CacheState,
    Floats,
    Ints,
    Verbs,
    advance,
    ask,
    demand,
    enter,
    fetch,
    forget_all_questions,
    release,
    start_step,
    unsigned,
)
from moe_beyond.cache.interconnect import NOW, QUEUED, is_instant
from moe_beyond.cache.jit import jit
from moe_beyond.cache.prefetchers import adaptive, moe_infinity, oracle, scored
from moe_beyond.cache.prefetchers.settings import ADAPTIVE, MOE_INFINITY, NONE, ORACLE, SCORED, Outlook, Plan


class Steps(NamedTuple):
    """A sequence, step by step.

    Attributes:
        ids: ``(n,)`` int64, the experts that every event demands, as ``layer * E + expert``, ascending within one.
        offsets: ``(S * L + 1,)`` int64, where each event's begin.
        tokens: ``(n,)`` int64, how many tokens of the step each is demanded for.
        scores: ``(S, H, L, E)`` float32, NaN where there are none; H may be 0.
        lookaheads: ``(H,)`` int64, ascending: when each slice of the scores is known; L for those known at the step's
            start, L + 1 for those known once the same layer of the step before is.
        computed: Whether a slice is known once a layer is computed; otherwise once it is routed.
        counted: ``(S,)``, whether a step counts, or belongs to the warm-up.
    """

    ids: Ints
    offsets: Ints
    tokens: Ints
    scores: npt.NDArray[np.float32]
    lookaheads: Ints
    computed: bool
    counted: npt.NDArray[np.bool_]


class Timing(NamedTuple):
    """Seconds that a layer takes besides its routed experts, and that one of those takes."""

    other: float
    expert: float


@jit
def _learn(cache: CacheState, policy: Any, verbs: Verbs, scores: npt.NDArray[np.float32], layer: int) -> None:
    """Take in a layer's scores ``(E,)``."""
    if np.isnan(scores[0]):
        return
    known = cache.known[layer * len(scores) : (layer + 1) * len(scores)]
    for expert in range(len(scores)):
        known[expert] = scores[expert]
    verbs.learned(policy, cache, layer)


@jit
def _names(cache: CacheState, plan: Plan, outlook: Outlook, layer: int) -> int:
    """Let the prefetcher name experts, after a layer or, at -1, at a step's start; return how many.

    It sees nothing but `CacheState.known`, and so no score before its lookahead makes it available.
    """
    layers = len(cache.counters)
    if plan.kind == NONE or (layer < 0 and not plan.first_layers and plan.kind != ORACLE):
        return 0
    if plan.kind == ORACLE:
        return oracle.names(cache, plan, outlook)
    if plan.kind == ADAPTIVE:
        return adaptive.names(cache, plan, outlook)
    if plan.kind == MOE_INFINITY:
        return moe_infinity.names(cache, plan, outlook)
    count = 0
    if layer < 0:
        for first in range(min(plan.distance, layers)):
            count = scored.names(cache, plan, first, count)
    elif plan.distance > 0 and layer + plan.distance < layers:
        count = scored.names(cache, plan, layer + plan.distance, 0)
    return count


@jit
def _foresee(outlook: Outlook, plan: Plan, timing: Timing, ends: float, layer: int) -> None:
    """Say when later layers will be routed, if this one ends then and nothing stalls more, for who asks by that."""
    if plan.kind == ADAPTIVE or plan.kind == MOE_INFINITY:
        for later in range(layer + 1, len(outlook.need)):
            ahead = later - layer
            outlook.need[later] = ends + ahead * timing.other + (ahead - 1) * plan.top_k * timing.expert


@jit
def _learn_ahead(cache: CacheState, policy: Any, verbs: Verbs, steps: Steps, step: int, layer: int) -> None:
    """Take in what is known after a layer, or, at -1, at a step's start.

    A slice of lookahead h tells of layer l once layer l - h is through. Where there is no such layer, it tells at the
    step's start, and of several such slices the one of the smallest lookahead does. One of lookahead L + 1 tells of a
    layer's next run once the layer is through.
    """
    layers = len(cache.counters)
    for i in range(len(steps.lookaheads) - 1, -1, -1):
        lookahead = steps.lookaheads[i]
        if lookahead > layers and step > 0 and layer < 0:
            continue  # known since the step before
        if lookahead > layers and layer >= 0:
            if step + 1 < len(steps.counted):
                _learn(cache, policy, verbs, steps.scores[step + 1, i, layer], layer)
        elif layer >= 0:
            if lookahead > 0 and layer + lookahead < layers:
                _learn(cache, policy, verbs, steps.scores[step, i, layer + lookahead], layer + lookahead)
        else:
            smaller = steps.lookaheads[i - 1] if i > 0 else 0
            for first in range(smaller, min(lookahead, layers)):
                _learn(cache, policy, verbs, steps.scores[step, i, first], first)


@jit
def _ask_ahead(cache: CacheState, policy: Any, verbs: Verbs, plan: Plan, outlook: Outlook, layer: int) -> None:
    """Ask for what the prefetcher names after a layer, or, at -1, at a step's start."""
    count = _names(cache, plan, outlook, layer)
    if plan.kind > SCORED:  # these name all that they want, not what comes on top
        forget_all_questions(cache)
    if count > 0:
        ask(cache, policy, verbs, cache.room[NAMED, :count])


@jit
def run(
    cache: CacheState,
    policy: Any,
    verbs: Verbs,
    plan: Plan,
    steps: Steps,
    timing: Timing,
    outlook: Outlook,
    spent: Floats,
    spans: Floats,
) -> None:
    """Step a sequence.

    Args:
        cache: A `CacheState`; it goes on from where it is.
        policy: The policy's own arrays.
        verbs: What it does.
        plan: The prefetcher.
        steps: The sequence.
        timing: Of the computing.
        outlook: With the demands of this sequence, and more, for the oracle; ``event`` moves along.
        spent: ``(S, 2)``, filled with each step's seconds of stall and of computing.
        spans: ``(events, 3)`` or empty, filled with the times at which each event was routed, had all its experts, and
            was through.
    """
    layers = len(cache.counters)
    link = cache.link
    event = 0
    cache.now[INSIST] = plan.kind == ORACLE
    for step in range(len(steps.counted)):
        begins = link.clock[NOW]
        start_step(cache, steps.counted[step])
        _foresee(outlook, plan, timing, begins, -1)
        _learn_ahead(cache, policy, verbs, steps, step, -1)
        _ask_ahead(cache, policy, verbs, plan, outlook, -1)
        for layer in range(layers):
            experts = steps.ids[steps.offsets[event] : steps.offsets[event + 1]]
            tokens = steps.tokens[steps.offsets[event] : steps.offsets[event + 1]]
            advance(cache, policy, verbs, link.clock[NOW] + timing.other)
            if len(steps.lookaheads) > 0 and steps.lookaheads[0] == 0:
                _learn(cache, policy, verbs, steps.scores[step, 0, layer], layer)
                if plan.kind == SCORED and plan.distance == 0 and (layer > 0 or plan.first_layers):
                    ask(cache, policy, verbs, cache.room[NAMED, : scored.names(cache, plan, layer, 0)])
            routed_at = link.clock[NOW]
            ready = demand(cache, policy, verbs, layer, experts, tokens)
            if not steps.computed:
                _learn_ahead(cache, policy, verbs, steps, step, layer)
            ready = fetch(cache, policy, verbs, experts, ready)
            outlook.event[0] += 1
            ends = ready + timing.expert * len(experts)
            _foresee(outlook, plan, timing, ends, layer)
            if not steps.computed:
                _ask_ahead(cache, policy, verbs, plan, outlook, layer)
            advance(cache, policy, verbs, ends)
            release(cache, experts)
            if link.tally[QUEUED] > 0 and is_instant(link):  # what found no room while the experts computed
                advance(cache, policy, verbs, ends)
            if steps.computed:
                _learn_ahead(cache, policy, verbs, steps, step, layer)
                _ask_ahead(cache, policy, verbs, plan, outlook, layer)
            spent[step, 0] += ready - routed_at
            if event < len(spans):
                spans[event, 0], spans[event, 1], spans[event, 2] = routed_at, ready, ends
            event += 1
        spent[step, 1] = link.clock[NOW] - begins - spent[step, 0]


@jit
def run_accesses(
    cache: CacheState, policy: Any, verbs: Verbs, ids: Ints, ends: Ints, counted: npt.NDArray[np.bool_]
) -> None:
    """Step a stream access by access, each judged by itself: no events, no prefetch, no clock.

    Args:
        cache: A `CacheState`; it goes on from where it is.
        policy: The policy's own arrays.
        verbs: What it does.
        ids: ``(n,)`` int64, the experts in the order of access.
        ends: ``(S,)`` int64, where each step's end.
        counted: ``(S,)``, whether a step counts.
    """
    now, experts, counters = cache.now, cache.experts, cache.counters
    size, pooled = experts.shape[1] // len(counters), len(cache.pools) > 1
    begins = layer = room = 0
    pool = unsigned(0)
    first = beyond = 0  # the ids of the layer that runs
    hits = accesses = 0
    event, ahead = now[EVENT], now[MOMENT] - now[EVENT]
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
                room = cache.pools[pool, CAPACITY] - cache.pools[pool, USED]
                now[LAYER] = layer
            accesses += 1
            event += 1
            now[EVENT], now[MOMENT] = event, event + ahead
            if experts[PLACE, expert] >= 0:
                hits += 1
                experts[LAST, expert] = event + ahead
                verbs.hit(policy, cache, expert)
                continue
            if room > 0:
                enter(cache, policy, verbs, expert, DEMANDED)
                room -= 1
                continue
            victim = unsigned(verbs.victim(policy, cache, pool))
            if not verbs.stages or verbs.admits(policy, cache, expert, victim):  # nothing was prefetched, so no origin
                place = unsigned(experts[PLACE, victim])
                experts[PLACE, victim] = -1
                verbs.evict(policy, cache, victim)
                cache.residents[pool, place] = expert
                experts[PLACE, expert] = place
                experts[LAST, expert] = event + ahead
                verbs.insert(policy, cache, expert)
        if counted[step]:
            _count(counters, layer, accesses, hits)
        hits = accesses = 0
        first = beyond = 0
        begins = ends[step]


@jit
def _count(counters: Ints, layer: int, accesses: int, hits: int) -> None:
    counters[layer, ACCESSES] += accesses
    counters[layer, HITS] += hits
    counters[layer, MISSES] += accesses - hits
    counters[layer, DEMAND_TRANSFERS] += accesses - hits
