"""Stepping a cache of experts: what happens at an event and at a prefetch.

An expert is one number, ``layer * E + expert``. An event demands a set of them: hits are judged against what was
resident before it, and all of the set holds slots while it computes, so that no victim comes from it. Whom to evict is
the policy's to say, through four compiled functions that are passed in (`Verbs`). Within an event experts are handled
in ascending order, so that a policy which goes by order breaks ties by the lowest (layer, expert).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.jit import jit

Ints = npt.NDArray[np.int64]

# Columns of the counters, one row a layer.
ACCESSES, HITS, LATE_HITS, MISSES, DEMAND_TRANSFERS, PREFETCH_TRANSFERS, USEFUL, WASTED = range(8)
COUNTERS = (
    "accesses",
    "hits",
    "late_hits",
    "misses",
    "demand_transfers",
    "prefetch_transfers",
    "useful_prefetches",
    "wasted_prefetches",
)

# What `origin` says of a resident.
DEMANDED, PREFETCHED, PREFETCHED_UNCOUNTED = range(3)


class Verbs(NamedTuple):
    """What a policy does; ``now`` counts events, from 1.

    Attributes:
        hit: ``(state, expert, pool, now)``: a resident was demanded, or named by a prefetch.
        insert: ``(state, expert, pool, now)``: it came in.
        evict: ``(state, expert, pool)``: it left.
        victim: ``(state, pool, residents, shield, mark)``: name one of ``residents`` with ``shield[expert] < mark``.
    """

    hit: Callable[[Any, int, int, int], None]
    insert: Callable[[Any, int, int, int], None]
    evict: Callable[[Any, int, int], None]
    victim: Callable[[Any, int, Ints, Ints, int], int]


class CacheState(NamedTuple):
    """Who is resident, and why.

    Attributes:
        pool_of: ``(L*E,)``, the pool whose slots an expert competes for.
        capacity: ``(pools,)``, slots.
        used: ``(pools,)``, slots taken.
        residents: ``(pools, largest capacity)``, who takes them, in no order.
        place: ``(L*E,)``, where in its pool's row an expert is; -1 if it is not resident.
        origin: ``(L*E,)``, `DEMANDED`, or prefetched and not demanded since.
        shield: ``(L*E,)``, the number of the last moment that demanded an expert or asked for it.
        mark: ``(1,)``, the present moment: an event, or the start of a token.
        layer_of: ``(L*E,)``.
        counters: ``(L, 8)``, what is counted, by layer of the expert.
    """

    pool_of: Ints
    capacity: Ints
    used: Ints
    residents: Ints
    place: Ints
    origin: Ints
    shield: Ints
    mark: Ints
    layer_of: Ints
    counters: Ints


def empty_cache(num_layers: int, num_experts: int, quotas: npt.ArrayLike) -> CacheState:
    """Return an empty cache.

    Args:
        num_layers: L.
        num_experts: E.
        quotas: Slots of each layer's pool, ``(L,)``; or of one pool for all, ``(1,)``.
    """
    capacity = np.asarray(quotas, np.int64)
    total = num_layers * num_experts
    layer_of = np.repeat(np.arange(num_layers), num_experts)
    return CacheState(
        pool_of=layer_of if len(capacity) > 1 else np.zeros(total, np.int64),
        capacity=capacity,
        used=np.zeros(len(capacity), np.int64),
        residents=np.full((len(capacity), int(capacity.max())), -1, np.int64),
        place=np.full(total, -1, np.int64),
        origin=np.zeros(total, np.int64),
        shield=np.zeros(total, np.int64),
        mark=np.ones(1, np.int64),  # past every shield: nothing has been asked for yet
        layer_of=layer_of,
        counters=np.zeros((num_layers, len(COUNTERS)), np.int64),
    )


@jit
def _leave(cache: CacheState, state: Any, verbs: Verbs, expert: int) -> None:
    """Evict an expert."""
    pool = cache.pool_of[expert]
    last = cache.used[pool] - 1
    moved = cache.residents[pool, last]
    cache.residents[pool, cache.place[expert]] = moved
    cache.place[moved] = cache.place[expert]
    cache.place[expert] = -1
    cache.used[pool] = last
    if cache.origin[expert] == PREFETCHED:
        cache.counters[cache.layer_of[expert], WASTED] += 1
    verbs.evict(state, expert, pool)


@jit
def _enter(cache: CacheState, state: Any, verbs: Verbs, expert: int, now: int, origin: int) -> None:
    """Bring an expert in, evicting the policy's victim if its pool is full."""
    pool = cache.pool_of[expert]
    if cache.used[pool] == cache.capacity[pool]:
        residents = cache.residents[pool, : cache.used[pool]]
        _leave(cache, state, verbs, verbs.victim(state, pool, residents, cache.shield, cache.mark[0]))
    cache.residents[pool, cache.used[pool]] = expert
    cache.place[expert] = cache.used[pool]
    cache.used[pool] += 1
    cache.origin[expert] = origin
    verbs.insert(state, expert, pool, now)


@jit
def demand(cache: CacheState, state: Any, verbs: Verbs, experts: Ints, now: int, counted: bool) -> int:
    """Step one event.

    Args:
        cache: A `CacheState`.
        state: The policy's own arrays.
        verbs: The policy's four functions.
        experts: ``(n,)`` int64, the distinct experts demanded, ascending; no more than a pool's capacity.
        now: The event's number, from 1.
        counted: Whether it counts, or belongs to the warm-up.

    Returns:
        Hits.
    """
    cache.mark[0] += 1
    for expert in experts:
        cache.shield[expert] = cache.mark[0]
    hits = 0
    for expert in experts:
        row = cache.counters[cache.layer_of[expert]]
        if cache.place[expert] >= 0:
            hits += 1
            if cache.origin[expert] == PREFETCHED:
                row[USEFUL] += 1
            cache.origin[expert] = DEMANDED
            verbs.hit(state, expert, cache.pool_of[expert], now)
            if counted:
                row[HITS] += 1
        else:
            _enter(cache, state, verbs, expert, now, DEMANDED)
            if counted:
                row[MISSES] += 1
                row[DEMAND_TRANSFERS] += 1
        if counted:
            row[ACCESSES] += 1
    return hits


@jit
def prefetch(cache: CacheState, state: Any, verbs: Verbs, candidates: Ints, now: int, counted: bool) -> int:
    """Ask for experts ahead of their event; they arrive in time.

    Neither the experts of the event that computes now nor what was asked for since it began are evicted. Where the
    candidates do not all fit, the best come in. A candidate that is resident counts as used to the policy: it is
    expected to be.

    Args:
        cache: A `CacheState`.
        state: The policy's own arrays.
        verbs: The policy's four functions.
        candidates: ``(m,)`` int64, distinct experts of one layer, best first; -1 names none.
        now: The number of the event that computes now.
        counted: Whether its transfers count, or belong to the warm-up.

    Returns:
        Transfers.
    """
    named = candidates[candidates >= 0]
    if len(named) == 0:
        return 0
    mark, pool = cache.mark[0], cache.pool_of[named[0]]
    for expert in named:
        if cache.place[expert] >= 0:
            cache.shield[expert] = mark
    free = cache.capacity[pool] - cache.used[pool]
    for resident in cache.residents[pool, : cache.used[pool]]:
        if cache.shield[resident] < mark:
            free += 1
    for expert in named:
        if cache.place[expert] < 0 and free > 0:
            cache.shield[expert] = mark
            free -= 1
    transfers = 0
    for expert in np.sort(named):
        if cache.place[expert] >= 0:
            verbs.hit(state, expert, pool, now)
        elif cache.shield[expert] == mark:
            _enter(cache, state, verbs, expert, now, PREFETCHED if counted else PREFETCHED_UNCOUNTED)
            transfers += 1
            if counted:
                cache.counters[cache.layer_of[expert], PREFETCH_TRANSFERS] += 1
    return transfers


@jit
def start_token(cache: CacheState) -> None:
    """Begin a token: no event computes now, so nothing is shielded."""
    cache.mark[0] += 1


@jit
def finish(cache: CacheState) -> None:
    """End a sequence: what was prefetched and never demanded is wasted."""
    for expert in range(len(cache.origin)):
        if cache.place[expert] >= 0 and cache.origin[expert] == PREFETCHED:
            cache.counters[cache.layer_of[expert], WASTED] += 1


@jit
def step_sequence(
    cache: CacheState,
    state: Any,
    verbs: Verbs,
    experts: Ints,
    named: Ints,
    distance: int,
    first_layers: bool,
    warmup: int,
) -> None:
    """Step a whole sequence, every token a step.

    Args:
        cache: An empty `CacheState`.
        state: The policy's own arrays.
        verbs: The policy's four functions.
        experts: ``(T, L, K)`` int64, each event's demand, ascending.
        named: ``(T, L, m)`` int64, what the prefetcher asks for, best first; m is 0 without one.
        distance: Layers between asking and needing; 0 asks right before the event.
        first_layers: Whether the first ``distance`` layers are asked for when the token starts; at distance 0, whether
            layer 0 is, right before its event.
        warmup: Tokens at the start that do not count.
    """
    length, layers, _ = experts.shape
    prefetching = named.shape[2] > 0
    now = 0
    for token in range(length):
        counted = token >= warmup
        start_token(cache)
        if prefetching and first_layers:
            for layer in range(min(distance, layers)):
                prefetch(cache, state, verbs, named[token, layer], now, counted)
        for layer in range(layers):
            if prefetching and distance == 0 and (first_layers or layer > 0):
                start_token(cache)  # the event before is over
                prefetch(cache, state, verbs, named[token, layer], now, counted)
            now += 1
            demand(cache, state, verbs, experts[token, layer], now, counted)
            if prefetching and distance > 0 and layer + distance < layers:
                prefetch(cache, state, verbs, named[token, layer + distance], now, counted)
    finish(cache)
