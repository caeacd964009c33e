"""belady: evict what is used again farthest in the future (Belady 1966).

No policy that must take in what is demanded, and does not prefetch, has more hits over a whole sequence from a cold
cache (`belady_bypass` need not take it in, and can have more). Where a warm-up is left out of the count, that holds for
warm-up and count together. Ties go by the lower (layer, expert).
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import EVENT, MARK, PLACE, CacheState, Ints, Verbs, is_held
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("future",)
OFFERS_SCORES = False
NEVER = 2**40  # an event that no sequence reaches; times the experts of any model it is far below 2**63


class BeladyState(NamedTuple):
    """When every expert is demanded, and who goes first.

    Attributes:
        events: All demands' event numbers, expert by expert, ascending.
        cursor: Per expert, its next demand in ``events``.
        end: Per expert, where its demands end.
        tree: A tournament of eights: node n has the nodes 8n + 1 to 8n + 8 below it, and the largest of their keys. The
            last ``size`` nodes are the experts, with their keys if they may go, else -1. A key is
            ``next use * size + (size - 1 - e)``: the farthest wins, of those the lowest expert.
        fresh: Experts whose keys are not in the tree yet, since nothing shielded may go.
        is_fresh: Per expert, whether it is among those.
        pending: ``(2,)``, how many those are, and the shield they came under.
    """

    events: Ints
    cursor: Ints
    end: Ints
    tree: Ints
    fresh: Ints
    is_fresh: Ints
    pending: Ints


def state(inputs: PolicyInputs) -> BeladyState:
    """Index the future by expert."""
    if inputs.future is None:
        raise ValueError("belady needs to know the future")
    ids = inputs.future.ids
    order = np.argsort(ids, kind="stable")
    end = np.cumsum(np.bincount(ids, minlength=inputs.num_ids))
    size = 8
    while size < inputs.num_ids:
        size *= 8
    return BeladyState(
        events=inputs.future.events()[order],
        cursor=np.concatenate([[0], end[:-1]]),
        end=end,
        tree=np.full((8 * size - 1) // 7, -1, np.int64),
        fresh=np.zeros(inputs.num_ids, np.int64),
        is_fresh=np.zeros(inputs.num_ids, np.int64),
        pending=np.zeros(2, np.int64),
    )


@jit
def next_use(policy: BeladyState, cache: CacheState, expert: int) -> int:
    """Return the event that demands an expert after the present one."""
    place, end = policy.cursor[expert], policy.end[expert]
    while place < end and policy.events[place] <= cache.now[EVENT]:
        place += 1
    policy.cursor[expert] = place
    return policy.events[place] if place < end else NEVER


@jit
def _size(policy: BeladyState) -> int:
    """Return how many leaves the tree has: 7 of 8 nodes, but for the root's part."""
    return (7 * len(policy.tree) + 1) // 8


@jit
def _enter_key(policy: BeladyState, expert: int, key: int) -> None:
    """Put a key into the tree, or -1 to take it out."""
    tree = policy.tree
    node = len(tree) - _size(policy) + expert
    before = tree[node]
    tree[node] = key
    while node > 0:
        node = (node - 1) >> 3
        if key >= tree[node]:
            largest = key
        elif before == tree[node]:  # it was the largest
            largest = tree[8 * node + 1]
            for child in range(8 * node + 2, 8 * node + 9):
                largest = max(largest, tree[child])
        else:
            return
        before, tree[node], key = tree[node], largest, largest


@jit
def insert(policy: BeladyState, cache: CacheState, expert: int) -> None:
    """It may go once its shield is gone."""
    if policy.pending[1] != cache.now[MARK]:
        _settle(policy, cache)
    if policy.is_fresh[expert] == 0:
        policy.is_fresh[expert] = 1
        policy.fresh[policy.pending[0]] = expert
        policy.pending[0] += 1


@jit
def _settle(policy: BeladyState, cache: CacheState) -> None:
    """Put the keys of the unshielded into the tree."""
    kept = 0
    size = _size(policy)
    for i in range(policy.pending[0]):
        expert = policy.fresh[i]
        if cache.experts[PLACE, expert] >= 0 and is_held(cache, expert):
            policy.fresh[kept] = expert
            kept += 1
            continue
        policy.is_fresh[expert] = 0
        if cache.experts[PLACE, expert] >= 0:
            _enter_key(policy, expert, next_use(policy, cache, expert) * size + size - 1 - expert)
    policy.pending[0], policy.pending[1] = kept, cache.now[MARK]


@jit
def evict(policy: BeladyState, cache: CacheState, expert: int) -> None:
    """Take it out of the tree."""
    if policy.tree[len(policy.tree) - _size(policy) + expert] >= 0:
        _enter_key(policy, expert, -1)


@jit
def hit(policy: BeladyState, cache: CacheState, expert: int) -> None:
    """It is shielded for now, and used again later than before."""
    evict(policy, cache, expert)
    insert(policy, cache, expert)


@jit
def victim(policy: BeladyState, cache: CacheState, pool: int) -> int:
    """Return the one whose next use is farthest; of those the lowest."""
    _settle(policy, cache)
    size = _size(policy)
    key = policy.tree[0]
    if len(cache.pools) > 1:  # a pool is a layer
        experts = cache.experts.shape[1] // len(cache.counters)
        first, key = len(policy.tree) - size + pool * experts, -1
        for leaf in range(first, first + experts):
            key = max(key, policy.tree[leaf])
    return size - 1 - key % size


VERBS = Verbs(hit, insert, evict, victim)
