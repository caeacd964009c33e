"""lfu: evict the expert that was demanded or prefetched least often in the sequence.

Counts outlive evictions. Ties go by recency. Residents with equal counts share a bucket, a ring by recency, and the
buckets of a pool form a chain by count. A use moves an expert to the next bucket, so hits and evictions are O(1) (Shah,
Mitra and Matani 2010, arXiv 2110.11602). An admission passes the buckets with lower counts.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, PolicyHooks, unsigned
from moe_beyond.cache.policies._ring import Ring, Rings, empty_rings, link, oldest, unlink
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False
MORE_THAN_ANY = 2**32 - 1


class Bucket(IntEnum):
    """Columns of `LfuState.buckets`: number of uses, and the next buckets with fewer and with more uses."""

    USES = 0
    FEWER = 1
    MORE = 2


class LfuState(NamedTuple):
    """Counts, and residents by their count.

    Attributes:
        uses: Number of uses of every expert, ``(L*E,)`` uint32.
        bucket: Bucket of every resident, ``(L*E,)`` uint32.
        buckets: Buckets, ``(pools + 1 + slots, 3)`` uint32, columns `Bucket`. Bucket p closes the chain of pool p: it
            is empty and has more uses than any. The next bucket heads the list of unused buckets, by ``MORE``.
        rings: Ring of each bucket, ``(L*E + buckets, 2)`` uint32.
    """

    uses: npt.NDArray[np.uint32]
    bucket: npt.NDArray[np.uint32]
    buckets: npt.NDArray[np.uint32]
    rings: Rings


def init(inputs: PolicyInputs) -> LfuState:
    """Return zero counts and no residents."""
    pools = len(inputs.capacity)
    numbers = np.arange(pools + 1 + int(inputs.capacity.sum()), dtype=np.uint32)
    buckets = np.stack([np.full_like(numbers, MORE_THAN_ANY), numbers, numbers], axis=1)
    buckets[pools:, Bucket.MORE] += 1
    counts = np.zeros(inputs.num_ids, np.uint32)
    return LfuState(counts, counts.copy(), buckets, empty_rings(inputs.num_ids, len(numbers)))


@jit
def _insert(policy: LfuState, cache: CacheState, fewer: int, expert: int) -> None:
    """Add an expert to the bucket of its count, which follows the bucket ``fewer`` or a later one."""
    buckets, uses = policy.buckets, policy.uses[expert]
    bucket = buckets[fewer, Bucket.MORE]
    while buckets[bucket, Bucket.USES] < uses:
        fewer, bucket = bucket, buckets[bucket, Bucket.MORE]
    if buckets[bucket, Bucket.USES] != uses:
        more, unused = bucket, unsigned(len(cache.pools))
        bucket = buckets[unused, Bucket.MORE]
        buckets[unused, Bucket.MORE] = buckets[bucket, Bucket.MORE]
        buckets[bucket, Bucket.USES] = uses
        buckets[bucket, Bucket.FEWER], buckets[bucket, Bucket.MORE] = fewer, more
        buckets[fewer, Bucket.MORE] = buckets[more, Bucket.FEWER] = bucket
    policy.bucket[expert] = bucket
    link(policy.rings, cache, unsigned(cache.experts.shape[1] + bucket), expert)


@jit
def _remove(policy: LfuState, cache: CacheState, expert: int) -> int:
    """Remove an expert; return the last bucket that is left with at most as many uses."""
    buckets, bucket = policy.buckets, policy.bucket[expert]
    head = unsigned(cache.experts.shape[1] + bucket)
    unlink(policy.rings, expert)
    if policy.rings[head, Ring.NEWER] != head:
        return bucket
    fewer, more = buckets[bucket, Bucket.FEWER], buckets[bucket, Bucket.MORE]
    buckets[fewer, Bucket.MORE], buckets[more, Bucket.FEWER] = more, fewer
    unused = unsigned(len(cache.pools))
    buckets[bucket, Bucket.MORE] = buckets[unused, Bucket.MORE]
    buckets[unused, Bucket.MORE] = bucket
    return fewer


@jit
def on_hit(policy: LfuState, cache: CacheState, expert: int) -> None:
    """Count a use of a resident."""
    policy.uses[expert] += 1
    _insert(policy, cache, _remove(policy, cache, expert), expert)


@jit
def on_admit(policy: LfuState, cache: CacheState, expert: int) -> None:
    """Count a use, and add the expert to the residents."""
    policy.uses[expert] += 1
    _insert(policy, cache, unsigned(cache.experts[Expert.POOL, expert]), expert)


@jit
def on_evict(policy: LfuState, cache: CacheState, expert: int) -> None:
    """Remove an expert from the residents."""
    _remove(policy, cache, expert)


@jit
def victim(policy: LfuState, cache: CacheState, pool: int) -> int:
    """Return the least frequently used resident that is not pinned."""
    heads, bucket = unsigned(cache.experts.shape[1]), policy.buckets[unsigned(pool), Bucket.MORE]
    expert = oldest(policy.rings, cache, unsigned(heads + bucket))
    while expert >= heads:
        bucket = policy.buckets[bucket, Bucket.MORE]
        expert = oldest(policy.rings, cache, unsigned(heads + bucket))
    return expert


HOOKS = PolicyHooks(on_hit, on_admit, on_evict, victim)
