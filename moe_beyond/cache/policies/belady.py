"""belady: evict the expert whose next use is farthest in the future (Belady 1966).

No policy that admits every demanded expert and does not prefetch has more hits over a whole sequence from a cold cache.
(`belady_bypass` need not admit it, and can have more hits.) With a warm-up that is not counted, this holds for the sum
of warm-up and counted tokens. Ties go by the lower (layer, expert).
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, PolicyHooks, is_pinned
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("future",)
OFFERS_SCORES = False
NO_NEXT_USE = 2**40  # an event that no sequence reaches; times the experts of any model it is far below 2**63


class Fresh(IntEnum):
    """Entries of `BeladyState.pending`: the number of fresh experts, and the pin epoch in which they were noted."""

    COUNT = 0
    PIN_EPOCH = 1


class BeladyState(NamedTuple):
    """Future uses of every expert, and a tournament over the residents.

    Attributes:
        events: Event numbers of all demand, expert by expert, ascending, ``(n,)`` int64.
        cursor: Index in ``events`` of each expert's next demand, ``(L*E,)`` int64.
        end: Index in ``events`` after each expert's last demand, ``(L*E,)`` int64.
        tree: Tournament with eight children per node, int64: node n has the children 8n + 1 to 8n + 8 and holds their
            largest key. The last ``size`` nodes are the experts, with their keys, or -1 if they are not candidates. A
            key is ``next use * size + (size - 1 - e)``: the farthest next use wins, among equals the lowest expert.
        fresh: Experts whose keys are not in the tree yet because they are pinned, ``(L*E,)`` int64.
        is_fresh: 1 for each expert in ``fresh``, ``(L*E,)`` int64.
        pending: Numbers about ``fresh``, ``(2,)`` int64, entries `Fresh`.
    """

    events: Ints
    cursor: Ints
    end: Ints
    tree: Ints
    fresh: Ints
    is_fresh: Ints
    pending: Ints


def init(inputs: PolicyInputs) -> BeladyState:
    """Index the future by expert."""
    if inputs.future is None:
        raise ValueError("belady needs the future")
    events, demands = inputs.future.events_by_expert
    end = np.cumsum(np.pad(demands, (0, inputs.num_ids - len(demands))))
    size = 8
    while size < inputs.num_ids:
        size *= 8
    return BeladyState(
        events=events,
        cursor=np.concatenate([[0], end[:-1]]),
        end=end,
        tree=np.full((8 * size - 1) // 7, -1, np.int64),
        fresh=np.zeros(inputs.num_ids, np.int64),
        is_fresh=np.zeros(inputs.num_ids, np.int64),
        pending=np.zeros(len(Fresh), np.int64),
    )


@jit
def next_use(policy: BeladyState, cache: CacheState, expert: int) -> int:
    """Return the number of the event after the current one that demands an expert."""
    place, end = policy.cursor[expert], policy.end[expert]
    while place < end and policy.events[place] <= cache.clock[Clock.EVENT]:
        place += 1
    policy.cursor[expert] = place
    return policy.events[place] if place < end else NO_NEXT_USE


@jit
def _size(policy: BeladyState) -> int:
    """Return the number of leaves of the tree: 7 of 8 nodes, rounded for the root."""
    return (7 * len(policy.tree) + 1) // 8


@jit
def _set_key(policy: BeladyState, expert: int, key: int) -> None:
    """Set an expert's key in the tree; -1 removes the expert."""
    tree = policy.tree
    node = len(tree) - _size(policy) + expert
    before = tree[node]
    tree[node] = key
    while node > 0:
        node = (node - 1) >> 3
        if key >= tree[node]:
            largest = key
        elif before == tree[node]:  # the old key was the largest
            largest = tree[8 * node + 1]
            for child in range(8 * node + 2, 8 * node + 9):
                largest = max(largest, tree[child])
        else:
            return
        before, tree[node], key = tree[node], largest, largest


@jit
def on_admit(policy: BeladyState, cache: CacheState, expert: int) -> None:
    """Note an expert, to enter the tree when its pin is gone."""
    if policy.pending[Fresh.PIN_EPOCH] != cache.clock[Clock.PIN_EPOCH]:
        _settle(policy, cache)
    if policy.is_fresh[expert] == 0:
        policy.is_fresh[expert] = 1
        policy.fresh[policy.pending[Fresh.COUNT]] = expert
        policy.pending[Fresh.COUNT] += 1


@jit
def _settle(policy: BeladyState, cache: CacheState) -> None:
    """Enter the keys of fresh experts that are not pinned into the tree."""
    kept = 0
    size = _size(policy)
    for i in range(policy.pending[Fresh.COUNT]):
        expert = policy.fresh[i]
        if cache.experts[Expert.PLACE, expert] >= 0 and is_pinned(cache, expert):
            policy.fresh[kept] = expert
            kept += 1
            continue
        policy.is_fresh[expert] = 0
        if cache.experts[Expert.PLACE, expert] >= 0:
            _set_key(policy, expert, next_use(policy, cache, expert) * size + size - 1 - expert)
    policy.pending[Fresh.COUNT], policy.pending[Fresh.PIN_EPOCH] = kept, cache.clock[Clock.PIN_EPOCH]


@jit
def on_evict(policy: BeladyState, cache: CacheState, expert: int) -> None:
    """Remove an expert from the tree."""
    if policy.tree[len(policy.tree) - _size(policy) + expert] >= 0:
        _set_key(policy, expert, -1)


@jit
def on_hit(policy: BeladyState, cache: CacheState, expert: int) -> None:
    """Update an expert that is pinned now and whose next use has moved."""
    on_evict(policy, cache, expert)
    on_admit(policy, cache, expert)


@jit
def victim(policy: BeladyState, cache: CacheState, pool: int) -> int:
    """Return the resident whose next use is farthest, among equals the lowest."""
    _settle(policy, cache)
    size = _size(policy)
    key = policy.tree[0]
    if len(cache.pools) > 1:  # a pool is a layer
        experts = cache.experts.shape[1] // len(cache.counters)
        first, key = len(policy.tree) - size + pool * experts, -1
        for leaf in range(first, first + experts):
            key = max(key, policy.tree[leaf])
    return size - 1 - key % size


HOOKS = PolicyHooks(on_hit, on_admit, on_evict, victim)
