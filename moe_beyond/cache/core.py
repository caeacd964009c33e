"""Stepping a cache of experts: what happens at an event, at a prefetch, and on the link between.

An expert is one number, ``layer * E + expert``. An event demands a set of them: hits are judged against what was
resident before it, and all of the set holds slots while it computes, so that no victim comes from it. Whom to evict is
the policy's to say, through compiled functions that are passed in (`Verbs`).

Time passes in `advance`. Without a device every transfer takes none: what is asked for is there at once, as far as
there is room.

A prefetch that has to wait becomes a use when it goes on the link, not when it is asked for. One whose pool has no room
is overtaken by those behind it. An expert that is still on the link may be evicted once the next event has begun: its
transfer is paid for and wasted. Ties between victims go by the moment of the last use, then by the lower (layer,
expert), unless a policy says otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.interconnect import FREE, NOW, ORDERED, QUEUED, WAITS, LinkState, is_instant, new_link, send
from moe_beyond.cache.jit import jit

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

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

# What `experts` tells of each, one row a fact: the pool whose slots it competes for; its layer; where in its pool's row
# of `residents` it is, -1 if nowhere; its origin; its shield; the last moment that demanded it, named it while it was
# resident, or sent it on the link, 0 for never.
POOL, IN_LAYER, PLACE, ORIGIN, SHIELD, LAST = range(6)

# Where a resident came from: demanded, or prefetched and not demanded since.
DEMANDED, PREFETCHED, PREFETCHED_UNCOUNTED = range(3)

# What `pools` tells of each: its slots; those taken; of those, the ones that hold a shielded expert.
CAPACITY, USED, HELD = range(3)

# What `now` holds: the number of the last event; of the last event or question; of the present shield; of the step;
# the layer of the last event (-1 between steps); whether the step counts; whether prefetches are never refused.
EVENT, MOMENT, MARK, STEP, LAYER, COUNTED, INSIST = range(7)

# What `room` is for: what a prefetcher names; and its working.
NAMED, ORDER, MARKED = range(3)


class CacheState(NamedTuple):
    """Who is resident, and why. Few arrays, of many rows: numba passes each in seven words.

    Attributes:
        experts: ``(6, L*E)`` int32, the facts above; a resident is no victim while its shield is ``now[MARK]``.
        pools: ``(pools, 3)``.
        residents: ``(pools, largest capacity)``, who takes a pool's slots, in no order; int32.
        known: ``(L*E,)`` float32, the score of an expert for the next time its layer runs; NaN where none is known now.
        now: ``(7,)``.
        counters: ``(L, 8)``, what is counted, by layer of the expert.
        room: ``(3, L*E)``.
        weights: ``(L*E,)`` float64, more room to work in.
        link: What is on its way.
    """

    experts: npt.NDArray[np.int32]
    pools: Ints
    residents: npt.NDArray[np.int32]
    known: npt.NDArray[np.float32]
    now: Ints
    counters: Ints
    room: Ints
    weights: Floats
    link: LinkState


@jit
def unsigned(number: int) -> int:
    """Make an index of a number from 0: numba asks of a signed one whether it counts from the end."""
    return np.uint32(number)  # type: ignore[return-value]


@jit
def ignore_expert(policy: Any, cache: CacheState, expert: int) -> None:
    """Take no interest in what becomes of an expert."""


@jit
def ignore_event(policy: Any, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Take no interest in what an event demands."""


@jit
def ignore_scores(policy: Any, cache: CacheState, layer: int) -> None:
    """Take no interest in scores."""


@jit
def admit(policy: Any, cache: CacheState, expert: int, victim: int) -> bool:
    """Let in whatever is prefetched."""
    return True


class Verbs(NamedTuple):
    """What a policy does. Its first argument is always its own state, the second the `CacheState`, which it reads.

    Attributes:
        hit: ``(policy, cache, expert)``: a resident was demanded, or named by a prefetch; its last moment is up to
            date.
        insert: ``(policy, cache, expert)``: it came in.
        evict: ``(policy, cache, expert)``: it has left, and another will take its slot.
        victim: ``(policy, cache, pool)``: name a resident of the pool that is not shielded; there is one.
        routed: ``(policy, cache, experts, tokens)``: an event demanded these, each for so many tokens.
        learned: ``(policy, cache, layer)``: scores of a layer have become known.
        admits: ``(policy, cache, expert, victim)``: whether to let a prefetch in for this victim. Where ``stages``
            is set, it is asked about demanded experts too.
        stages: Whether demanded experts compute in slots of their own next to the pool (K for a token, as many as are
            demanded for a batch or a chunk), and are retained, or not, when their event ends. These slots come on top
            of the budget.
    """

    hit: Callable[[Any, CacheState, int], None]
    insert: Callable[[Any, CacheState, int], None]
    evict: Callable[[Any, CacheState, int], None]
    victim: Callable[[Any, CacheState, int], int]
    routed: Callable[[Any, CacheState, Ints, Ints], None] = ignore_event
    learned: Callable[[Any, CacheState, int], None] = ignore_scores
    admits: Callable[[Any, CacheState, int, int], bool] = admit
    stages: bool = False


def empty_cache(num_layers: int, num_experts: int, quotas: npt.ArrayLike, link: LinkState | None = None) -> CacheState:
    """Return an empty cache.

    Args:
        num_layers: L.
        num_experts: E.
        quotas: Slots of each layer's pool, ``(L,)``; or of one pool for all, ``(1,)``.
        link: What experts cross; one that takes no time by default.
    """
    capacity = np.asarray(quotas, np.int64)
    total = num_layers * num_experts
    experts = np.zeros((6, total), np.int32)
    experts[IN_LAYER] = np.repeat(np.arange(num_layers), num_experts)
    experts[POOL] = experts[IN_LAYER] if len(capacity) > 1 else 0
    experts[PLACE] = -1
    now = np.zeros(7, np.int64)
    now[MARK], now[LAYER], now[COUNTED] = 1, -1, 1  # past every shield: nothing has been asked for yet
    return CacheState(
        experts=experts,
        pools=np.stack([capacity, np.zeros_like(capacity), np.zeros_like(capacity)], axis=1),
        residents=np.full((len(capacity), int(capacity.max())), -1, np.int32),
        known=np.full(total, np.nan, np.float32),
        now=now,
        counters=np.zeros((num_layers, len(COUNTERS)), np.int64),
        room=np.zeros((3, total), np.int64),
        weights=np.zeros(total),
        link=new_link(total) if link is None else link,
    )


@jit
def is_held(cache: CacheState, expert: int) -> bool:
    """Tell whether a resident is no victim now."""
    return cache.experts[SHIELD, expert] == cache.now[MARK]


@jit
def _hold(cache: CacheState, expert: int) -> None:
    """Shield a resident until the next event, or until it is released."""
    if not is_held(cache, expert):
        cache.experts[SHIELD, expert] = cache.now[MARK]
        cache.pools[cache.experts[POOL, expert], HELD] += 1


@jit
def _unshield_all(cache: CacheState) -> None:
    cache.now[MARK] += 1
    cache.pools[:, HELD] = 0


@jit
def enter(cache: CacheState, policy: Any, verbs: Verbs, expert: int, origin: int) -> None:
    """Give an expert a free slot of its pool."""
    pool = cache.experts[POOL, expert]
    _settle(cache, policy, verbs, expert, pool, cache.pools[pool, USED], origin)
    cache.pools[pool, USED] += 1


@jit
def replace(cache: CacheState, policy: Any, verbs: Verbs, victim: int, expert: int, origin: int) -> None:
    """Evict a resident, and give its slot to an expert of the same pool."""
    place = cache.experts[PLACE, victim]
    cache.experts[PLACE, victim] = -1
    if cache.experts[ORIGIN, victim] == PREFETCHED:
        cache.counters[cache.experts[IN_LAYER, victim], WASTED] += 1
    verbs.evict(policy, cache, victim)
    _settle(cache, policy, verbs, expert, cache.experts[POOL, expert], place, origin)


@jit
def _settle(cache: CacheState, policy: Any, verbs: Verbs, expert: int, pool: int, place: int, origin: int) -> None:
    cache.residents[pool, place] = expert
    cache.experts[PLACE, expert] = place
    cache.experts[ORIGIN, expert] = origin
    cache.experts[LAST, expert] = cache.now[MOMENT]
    verbs.insert(policy, cache, expert)


@jit
def start_step(cache: CacheState, counted: bool) -> None:
    """Begin a step (a token, or several at once): nothing computes, so nothing is shielded."""
    cache.now[STEP] += 1
    cache.now[LAYER] = -1
    cache.now[COUNTED] = counted
    _unshield_all(cache)


@jit
def demand(cache: CacheState, policy: Any, verbs: Verbs, layer: int, experts: Ints, tokens: Ints) -> float:
    """Begin an event: a layer is routed. Nothing moves yet: `fetch` follows, once what that tells is learned.

    Args:
        cache: A `CacheState`.
        policy: The policy's own arrays.
        verbs: What it does.
        layer: The layer.
        experts: ``(n,)`` int64, its distinct experts that are demanded, if any; no more than a pool's capacity.
        tokens: ``(n,)`` int64, how many tokens each is demanded for.

    Returns:
        When all that are resident have arrived, on the link's clock.
    """
    link, counted = cache.link, cache.now[COUNTED] == 1
    cache.now[EVENT] += 1
    cache.now[MOMENT] += 1
    _unshield_all(cache)
    cache.now[LAYER] = layer
    row = cache.counters[layer]
    ready = link.clock[NOW]
    for expert in experts:
        if cache.experts[PLACE, expert] < 0:
            continue
        late = link.arrives[expert] > link.clock[NOW]
        if late:
            ready = max(ready, link.arrives[expert])
        elif cache.experts[ORIGIN, expert] == PREFETCHED:
            row[USEFUL] += 1
        if counted:
            row[ACCESSES] += 1
            row[LATE_HITS if late else HITS] += 1
        cache.experts[ORIGIN, expert] = DEMANDED
        cache.experts[LAST, expert] = cache.now[MOMENT]
        _hold(cache, expert)
        verbs.hit(policy, cache, expert)
    size = cache.experts.shape[1] // len(cache.counters)
    for expert in range(layer * size, (layer + 1) * size):
        cache.known[expert] = np.nan  # it was of this run
    verbs.routed(policy, cache, experts, tokens)
    return ready


@jit
def fetch(cache: CacheState, policy: Any, verbs: Verbs, experts: Ints, ready: float) -> float:
    """Move in what an event demands and the cache lacks.

    Args:
        cache: A `CacheState`.
        policy: The policy's own arrays.
        verbs: What it does.
        experts: Those of `demand`.
        ready: What that returned.

    Returns:
        When all of them have arrived.
    """
    link, counted = cache.link, cache.now[COUNTED] == 1
    layer = cache.now[LAYER]
    row = cache.counters[layer]
    missing = 0
    for expert in experts:
        missing += cache.experts[PLACE, expert] < 0
    if missing:
        coming = cache.room[ORDER, :missing]
        missing = 0
        for expert in experts:
            if cache.experts[PLACE, expert] < 0:
                coming[missing] = expert
                missing += 1
        for expert in coming:
            asked = link.queue[WAITS, expert] == 1
            if counted:
                row[ACCESSES] += 1
                row[LATE_HITS if asked else MISSES] += 1
                row[PREFETCH_TRANSFERS if asked else DEMAND_TRANSFERS] += 1
            ready = send(link, expert, link.clock[NOW], False)
        if verbs.stages:
            _unshield_all(cache)
            for expert in coming:
                _retain(cache, policy, verbs, expert)
        else:
            pool = cache.experts[POOL, experts[0]]
            for expert in coming:
                if cache.pools[pool, USED] == cache.pools[pool, CAPACITY]:
                    replace(cache, policy, verbs, verbs.victim(policy, cache, pool), expert, DEMANDED)
                else:
                    enter(cache, policy, verbs, expert, DEMANDED)
                _hold(cache, expert)
    if link.tally[QUEUED] > 0:
        _forget_questions(cache, layer)
    return ready


@jit
def _retain(cache: CacheState, policy: Any, verbs: Verbs, expert: int) -> None:
    """Keep a staged expert, if the policy would rather have it than its victim."""
    pool = cache.experts[POOL, expert]
    if cache.pools[pool, USED] < cache.pools[pool, CAPACITY]:
        enter(cache, policy, verbs, expert, DEMANDED)
        return
    victim = verbs.victim(policy, cache, pool)
    if verbs.admits(policy, cache, expert, victim):
        replace(cache, policy, verbs, victim, expert, DEMANDED)


@jit
def _forget_questions(cache: CacheState, layer: int) -> None:
    """Drop what was asked for of a layer and never went on the link: its event is here."""
    link, kept = cache.link, 0
    for i in range(link.tally[QUEUED]):
        expert = link.queue[ORDERED, i]
        if cache.experts[IN_LAYER, expert] == layer:
            link.queue[WAITS, expert] = 0
        else:
            link.queue[ORDERED, kept] = expert
            kept += 1
    link.tally[QUEUED] = kept


@jit
def release(cache: CacheState, experts: Ints) -> None:
    """End an event's computing: its experts may be evicted."""
    for expert in experts:
        if cache.experts[PLACE, expert] >= 0 and is_held(cache, expert):
            cache.experts[SHIELD, expert] = 0
            cache.pools[cache.experts[POOL, expert], HELD] -= 1


@jit
def forget_all_questions(cache: CacheState) -> None:
    """Drop what was asked for and has not gone on the link, to ask anew."""
    for i in range(cache.link.tally[QUEUED]):
        cache.link.queue[WAITS, cache.link.queue[ORDERED, i]] = 0
    cache.link.tally[QUEUED] = 0


@jit
def ask(cache: CacheState, policy: Any, verbs: Verbs, named: Ints) -> None:
    """Ask for experts ahead of their event, behind what was asked for before.

    Neither the experts that compute now nor what was asked for since their event began are evicted for it. An expert
    that is resident counts as used to the policy: it is expected to be.

    Args:
        cache: A `CacheState`.
        policy: The policy's own arrays.
        verbs: What it does.
        named: ``(m,)`` int64, distinct experts, the most urgent first.
    """
    if len(named) == 0:
        return
    link = cache.link
    cache.now[MOMENT] += 1
    for expert in named:
        if cache.experts[PLACE, expert] >= 0:
            _hold(cache, expert)
            cache.experts[LAST, expert] = cache.now[MOMENT]
            verbs.hit(policy, cache, expert)
        elif link.queue[WAITS, expert] == 0:
            link.queue[ORDERED, link.tally[QUEUED]] = expert
            link.tally[QUEUED] += 1
            link.queue[WAITS, expert] = 1
    advance(cache, policy, verbs, link.clock[NOW])


@jit
def advance(cache: CacheState, policy: Any, verbs: Verbs, until: float) -> None:
    """Let time pass; what was asked for goes on the link one by one while it is free, as far as there is room."""
    link = cache.link
    since, kept = link.clock[NOW], 0
    link.clock[NOW] = until
    for i in range(link.tally[QUEUED]):
        expert = link.queue[ORDERED, i]
        pool = cache.experts[POOL, expert]
        full = cache.pools[pool, USED] == cache.pools[pool, CAPACITY]
        in_time = max(link.clock[FREE], since) < until or is_instant(link)
        if not in_time or (full and cache.pools[pool, HELD] == cache.pools[pool, USED]):
            link.queue[ORDERED, kept] = expert
            kept += 1
            continue
        link.queue[WAITS, expert] = 0
        counted = cache.now[COUNTED] == 1
        origin = PREFETCHED if counted else PREFETCHED_UNCOUNTED
        if full:
            victim = verbs.victim(policy, cache, pool)
            if cache.now[INSIST] == 0 and not verbs.admits(policy, cache, expert, victim):
                continue
            replace(cache, policy, verbs, victim, expert, origin)
        else:
            enter(cache, policy, verbs, expert, origin)
        _hold(cache, expert)
        send(link, expert, since, True)
        if counted:
            cache.counters[cache.experts[IN_LAYER, expert], PREFETCH_TRANSFERS] += 1
    link.tally[QUEUED] = kept


@jit
def preload(cache: CacheState, policy: Any, verbs: Verbs, experts: Ints) -> None:
    """Fill a cold cache before the first step, the best last; counted as prefetched, also where a warm-up follows."""
    for expert in experts:
        if cache.pools[cache.experts[POOL, expert], USED] < cache.pools[cache.experts[POOL, expert], CAPACITY]:
            cache.now[MOMENT] += 1
            enter(cache, policy, verbs, expert, PREFETCHED)
            cache.link.clock[NOW] = send(cache.link, expert, cache.link.clock[NOW], True)
            cache.counters[cache.experts[IN_LAYER, expert], PREFETCH_TRANSFERS] += 1


@jit
def finish(cache: CacheState) -> None:
    """End a sequence: what was prefetched and never demanded is wasted."""
    for expert in range(cache.experts.shape[1]):
        if cache.experts[PLACE, expert] >= 0 and cache.experts[ORIGIN, expert] == PREFETCHED:
            cache.counters[cache.experts[IN_LAYER, expert], WASTED] += 1
            cache.experts[ORIGIN, expert] = PREFETCHED_UNCOUNTED
    forget_all_questions(cache)
