"""State of an expert cache: slots, residents, pins, and the hooks of a policy.

An expert is one number, ``layer * E + expert``. The policy chooses victims through compiled functions (`PolicyHooks`).
Ties between victims go by the time of the last use, then by the lower (layer, expert), unless a policy has another
rule.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit, jit_apart
from moe_beyond.cache.counters import Counter
from moe_beyond.cache.interconnect import LinkState, Seconds, new_link, send

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Expert(IntEnum):
    """Rows of `CacheState.experts`.

    ``POOL`` is the pool whose slots the expert competes for. ``PLACE`` is its index in the pool's row of
    `CacheState.residents`, -1 if it is not resident. ``ORIGIN`` is one of `Origin`. An expert is pinned while its
    ``PIN_EPOCH`` equals that of the clock. ``LAST_USE`` is the clock's time of its last use, 0 for never: a demand, a
    prefetch while it was resident, or the start of its transfer. ``UNITS`` is the part of its pool's capacity that it
    takes: 1 if all experts have the same size.
    """

    POOL = 0
    LAYER = 1
    PLACE = 2
    ORIGIN = 3
    PIN_EPOCH = 4
    LAST_USE = 5
    UNITS = 6


class Origin(IntEnum):
    """Reason why an expert is resident: demanded, or prefetched and not demanded since."""

    DEMANDED = 0
    PREFETCHED = 1
    PREFETCHED_UNCOUNTED = 2


class Pool(IntEnum):
    """Columns of `CacheState.pools`.

    ``CAPACITY`` is the size of the pool in units, ``FREE`` its units without an expert, and ``PINNED`` its units whose
    expert is pinned. If all experts have the same size, a unit is a slot. ``USED`` is the number of residents, and
    ``FIRST`` the number of the pool's first slot.
    """

    CAPACITY = 0
    USED = 1
    PINNED = 2
    FIRST = 3
    FREE = 4


class Clock(IntEnum):
    """Entries of `CacheState.clock`.

    ``EVENT`` numbers events. ``TIME`` is the logical time: it counts events and prefetch requests. ``LAYER`` is the
    layer of the last event, -1 between steps. ``COUNTED`` is 1 if the step counts. ``FORCED`` is 1 if the policy must
    admit every prefetch.

    ``HITS``, ``LATE_HITS`` and ``MISSES`` count the demanded experts of the last event. ``MISSING`` is the number of
    those that need a transfer, and ``MOVED`` the number of those whose wave has begun. ``WAVE`` is the number of waves
    that have begun. ``MIXED`` is 1 if experts differ in size: one test that is cheaper than reading sizes. ``ON_HOST``
    is the number of demanded experts that the host computes, and ``HANDLING`` one of
    `moe_beyond.cache.misses.Handling`.
    """

    EVENT = 0
    TIME = 1
    PIN_EPOCH = 2
    STEP = 3
    LAYER = 4
    COUNTED = 5
    FORCED = 6
    HITS = 7
    LATE_HITS = 8
    MISSES = 9
    MISSING = 10
    MOVED = 11
    WAVE = 12
    MIXED = 13
    ON_HOST = 14
    HANDLING = 15


class Scratch(IntEnum):
    """Rows of `CacheState.scratch_int`.

    ``SELECTED`` holds the experts that a prefetcher selects; ``ORDER`` and ``MARKED`` are for its work, and for that of
    miss handling. ``MISSING`` holds the demanded experts of the last event that need a transfer, and ``ON_HOST`` those
    that the host computes, both ascending.
    """

    SELECTED = 0
    ORDER = 1
    MARKED = 2
    MISSING = 3
    ON_HOST = 4


class CacheState(NamedTuple):
    """Arrays of a cache; few and with many rows, because numba passes each array in seven words.

    Attributes:
        experts: Facts of each expert, ``(7, L*E)`` int32, rows `Expert`.
        pools: Sizes of each pool, ``(pools, 5)`` int64, columns `Pool`.
        residents: Experts of each pool in no order, ``(pools, most residents)`` int32. An expert keeps its place if
            all experts have the same size.
        scores: Score of each expert for its layer's next run, ``(L*E,)`` float32; NaN if no score is available.
        clock: Numbers of the current event and step, ``(16,)`` int64, entries `Clock`.
        counters: Counts by layer of the expert, ``(L, 9)`` int64, columns `Counter`.
        scratch_int: Work space of events and the prefetcher, ``(5, L*E)`` int64, rows `Scratch`.
        scratch_float: Work space of the prefetcher, ``(L*E,)`` float64.
        link: Interconnect, with its queue and transfers.
    """

    experts: npt.NDArray[np.int32]
    pools: Ints
    residents: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    clock: Ints
    counters: Ints
    scratch_int: Ints
    scratch_float: Floats
    link: LinkState


@jit
def unsigned(number: int) -> int:
    """Convert a number to an unsigned index; numba checks every signed index for counting from the end."""
    return np.uint32(number)  # type: ignore[return-value]


@jit
def ignore_expert(policy: Any, cache: CacheState, expert: int) -> None:
    """Hook of a policy that does not react to a hit, an admission or an eviction."""


@jit
def ignore_demand(policy: Any, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Hook of a policy that does not react to the demand of an event."""


@jit
def ignore_scores(policy: Any, cache: CacheState, layer: int) -> None:
    """Hook of a policy that does not read scores."""


@jit
def admit_all(policy: Any, cache: CacheState, expert: int, victim: int) -> bool:
    """Hook of a policy that admits every expert."""
    return True


class PolicyHooks(NamedTuple):
    """Compiled functions of a policy.

    The first argument of each function is the value that the policy's ``init`` returned. The second is the
    `CacheState`, which a policy only reads.

    Attributes:
        on_hit: ``(policy, cache, expert)``, after a resident was demanded or prefetched again; its last use is updated.
        on_admit: ``(policy, cache, expert)``, after an expert became resident.
        on_evict: ``(policy, cache, expert)``, after an expert lost its slot and before another expert gets it.
        victim: ``(policy, cache, pool) -> expert``, a resident of the pool that is not pinned; there is at least one.
        on_demand: ``(policy, cache, experts, tokens)``, after an event demanded these experts, each for that many
            tokens (default: nothing).
        on_scores: ``(policy, cache, layer)``, after scores of a layer became available (default: nothing).
        admit: ``(policy, cache, expert, victim) -> bool``, whether a prefetched expert may replace the victim; with
            ``bypass`` also whether a demanded one may (default: always).
        bypass: Whether demanded experts compute in slots next to the pool, and are admitted or not when their event
            ends (default: False). These slots come on top of the budget: K for a token, or the demand of a batch or
            chunk.
    """

    on_hit: Callable[[Any, CacheState, int], None]
    on_admit: Callable[[Any, CacheState, int], None]
    on_evict: Callable[[Any, CacheState, int], None]
    victim: Callable[[Any, CacheState, int], int]
    on_demand: Callable[[Any, CacheState, Ints, Ints], None] = ignore_demand
    on_scores: Callable[[Any, CacheState, int], None] = ignore_scores
    admit: Callable[[Any, CacheState, int, int], bool] = admit_all
    bypass: bool = False

    @property
    def reads_scores(self) -> bool:
        """Whether the policy reads scores."""
        return self.on_scores is not ignore_scores

    @property
    def reads_events(self) -> bool:
        """Whether the policy reads the demand of whole events."""
        return self.on_demand is not ignore_demand


def empty_cache(
    num_layers: int,
    num_experts: int,
    capacities: npt.ArrayLike,
    link: LinkState | None = None,
    units: npt.ArrayLike = 1,
) -> CacheState:
    """Return an empty cache.

    Args:
        num_layers: Number of MoE layers L.
        num_experts: Number of experts per layer E.
        capacities: Units of each layer's pool, ``(L,)``, or of one pool for all layers, ``(1,)``.
        link: Interconnect (default: one whose transfers take no time).
        units: Units of an expert of each layer, ``(L,)`` (default: 1, so that a unit is a slot).
    """
    capacity = np.asarray(capacities, np.int64)
    total = num_layers * num_experts
    sizes = np.broadcast_to(np.asarray(units, np.int64), num_layers)
    smallest = sizes if len(capacity) > 1 else sizes.min(keepdims=True)
    slots = np.minimum(capacity // smallest, total // len(capacity))
    experts = np.zeros((len(Expert), total), np.int32)
    experts[Expert.LAYER] = np.repeat(np.arange(num_layers), num_experts)
    experts[Expert.POOL] = experts[Expert.LAYER] if len(capacity) > 1 else 0
    experts[Expert.PLACE] = -1
    experts[Expert.UNITS] = np.repeat(sizes, num_experts)
    clock = np.zeros(len(Clock), np.int64)
    clock[Clock.PIN_EPOCH] = 1  # after the epoch 0 of all experts: none is pinned
    clock[Clock.LAYER] = -1
    clock[Clock.COUNTED] = 1
    clock[Clock.MIXED] = sizes.max() > 1
    return CacheState(
        experts=experts,
        pools=np.stack([capacity, 0 * capacity, 0 * capacity, np.cumsum(slots) - slots, capacity], axis=1),
        residents=np.full((len(capacity), int(slots.max())), -1, np.int32),
        scores=np.full(total, np.nan, np.float32),
        clock=clock,
        counters=np.zeros((num_layers, len(Counter)), np.int64),
        scratch_int=np.zeros((len(Scratch), total), np.int64),
        scratch_float=np.zeros(total),
        link=new_link(total) if link is None else link,
    )


@jit
def is_pinned(cache: CacheState, expert: int) -> bool:
    """Return whether a resident is protected from eviction."""
    return cache.experts[Expert.PIN_EPOCH, expert] == cache.clock[Clock.PIN_EPOCH]


@jit
def units_of(cache: CacheState, expert: int) -> int:
    """Return the units of its pool that an expert takes."""
    return 1 if cache.clock[Clock.MIXED] == 0 else cache.experts[Expert.UNITS, expert]


@jit
def pin(cache: CacheState, expert: int) -> None:
    """Protect a resident from eviction until the next event, or until `unpin`."""
    if not is_pinned(cache, expert):
        cache.experts[Expert.PIN_EPOCH, expert] = cache.clock[Clock.PIN_EPOCH]
        cache.pools[cache.experts[Expert.POOL, expert], Pool.PINNED] += units_of(cache, expert)


@jit
def unpin(cache: CacheState, experts: Ints) -> None:
    """End the computing of a wave: its experts may be evicted."""
    for expert in experts:
        if cache.experts[Expert.PLACE, expert] >= 0 and is_pinned(cache, expert):
            cache.experts[Expert.PIN_EPOCH, expert] = 0
            cache.pools[cache.experts[Expert.POOL, expert], Pool.PINNED] -= units_of(cache, expert)


@jit
def unpin_all(cache: CacheState) -> None:
    """Remove every pin by starting a new epoch."""
    cache.clock[Clock.PIN_EPOCH] += 1
    cache.pools[:, Pool.PINNED] = 0


@jit
def enter(cache: CacheState, policy: Any, hooks: PolicyHooks, expert: int, origin: int) -> None:
    """Give an expert a place in its pool, which has room."""
    pool = cache.experts[Expert.POOL, expert]
    _settle(cache, policy, hooks, expert, pool, cache.pools[pool, Pool.USED], origin)
    cache.pools[pool, Pool.USED] += 1
    cache.pools[pool, Pool.FREE] -= units_of(cache, expert)


@jit
def replace(cache: CacheState, policy: Any, hooks: PolicyHooks, victim: int, expert: int, origin: int) -> None:
    """Evict a resident and give its place to an expert of the same pool.

    If the expert is larger than the room, the policy's next victims are evicted too.
    """
    if cache.clock[Clock.MIXED] == 1:
        victim = _make_room(cache, policy, hooks, victim, expert)
    place = cache.experts[Expert.PLACE, victim]
    _evict(cache, policy, hooks, victim)
    _settle(cache, policy, hooks, expert, cache.experts[Expert.POOL, expert], place, origin)


@jit_apart
def _make_room(cache: CacheState, policy: Any, hooks: PolicyHooks, victim: int, expert: int) -> int:
    """Evict residents until one more eviction makes room for an expert; return the last victim, whose place it gets."""
    pool = cache.experts[Expert.POOL, expert]
    more = cache.experts[Expert.UNITS, expert] - cache.experts[Expert.UNITS, victim]
    while cache.pools[pool, Pool.FREE] < more:
        _remove(cache, policy, hooks, victim, pool)
        victim = hooks.victim(policy, cache, pool)
        more = cache.experts[Expert.UNITS, expert] - cache.experts[Expert.UNITS, victim]
    cache.pools[pool, Pool.FREE] -= more
    return victim


@jit
def _evict(cache: CacheState, policy: Any, hooks: PolicyHooks, victim: int) -> None:
    """Make an expert no resident."""
    cache.experts[Expert.PLACE, victim] = -1
    if cache.experts[Expert.ORIGIN, victim] == Origin.PREFETCHED:
        cache.counters[cache.experts[Expert.LAYER, victim], Counter.WASTED_PREFETCHES] += 1
    hooks.on_evict(policy, cache, victim)


@jit
def _remove(cache: CacheState, policy: Any, hooks: PolicyHooks, victim: int, pool: int) -> None:
    """Evict a resident; the last resident of its pool gets its place."""
    last = cache.pools[pool, Pool.USED] - 1
    place, moved = cache.experts[Expert.PLACE, victim], cache.residents[pool, last]
    cache.residents[pool, place], cache.experts[Expert.PLACE, moved] = moved, place
    cache.pools[pool, Pool.USED] = last
    cache.pools[pool, Pool.FREE] += cache.experts[Expert.UNITS, victim]
    _evict(cache, policy, hooks, victim)


@jit
def _settle(
    cache: CacheState, policy: Any, hooks: PolicyHooks, expert: int, pool: int, place: int, origin: int
) -> None:
    """Make an expert resident at a place of its pool."""
    cache.residents[pool, place] = expert
    cache.experts[Expert.PLACE, expert] = place
    cache.experts[Expert.ORIGIN, expert] = origin
    cache.experts[Expert.LAST_USE, expert] = cache.clock[Clock.TIME]
    hooks.on_admit(policy, cache, expert)


@jit
def start_step(cache: CacheState, counted: bool) -> None:
    """Begin a step (one token, or several that are computed together): no expert computes, so none is pinned."""
    cache.clock[Clock.STEP] += 1
    cache.clock[Clock.LAYER] = -1
    cache.clock[Clock.COUNTED] = counted
    unpin_all(cache)


@jit
def preload(cache: CacheState, policy: Any, hooks: PolicyHooks, experts: Ints) -> None:
    """Fill a cold cache before the first step; the transfers count as prefetches, also if a warm-up follows.

    Args:
        cache: Cache to fill.
        policy: Value that the policy's ``init`` returned.
        hooks: Functions of the policy.
        experts: Distinct experts, the most popular last, ``(n,)`` int64.
    """
    begins = ends = cache.link.seconds[Seconds.NOW]
    for expert in experts:
        pool = cache.experts[Expert.POOL, expert]
        if cache.pools[pool, Pool.FREE] >= units_of(cache, expert):
            cache.clock[Clock.TIME] += 1
            enter(cache, policy, hooks, expert, Origin.PREFETCHED)
            ends = max(ends, send(cache.link, expert, begins, True))
            cache.counters[cache.experts[Expert.LAYER, expert], Counter.PREFETCH_TRANSFERS] += 1
    cache.link.seconds[Seconds.NOW] = ends
