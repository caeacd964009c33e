"""class_lru: llama.cpp's ClassLRU (ggml-org/llama.cpp#31233): recency, slowed down for frequently used experts.

An expert's frequency halves every 128 tokens: F <- F * 2^(-tokens/128) + 1 at each use, kept across evictions. Its
class is floor(log2 F), within 0..7, at its last use. The victim has the largest age / 2^class, with the age in events.
Each class has a ring by recency, so the victim is the oldest expert of a class.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Floats, Ints, PolicyHooks, unsigned
from moe_beyond.cache.policies._ring import Rings, empty_rings, link, oldest, unlink
from moe_beyond.cache.policies._scan import goes_before
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False
HALF_LIFE, CLASSES = 128, 8
FADES = np.array([2.0 ** (-age / HALF_LIFE) for age in range(80 * HALF_LIFE)])
"""Weight of a use by its age in steps; when an older use is added to 1, rounding removes it."""


class ClassLruState(NamedTuple):
    """Frequencies, and residents by class.

    Attributes:
        frequency: Decayed frequency of every expert at its last use, ``(L*E,)`` float64.
        step: Step of every expert's last use, ``(L*E,)`` int64.
        event: Event of every expert's last use, ``(L*E,)`` int64.
        rings: Ring of each class of each pool, ``(L*E + pools * CLASSES, 2)`` uint32.
        fades: Weights of a use, `FADES`.
    """

    frequency: Floats
    step: Ints
    event: Ints
    rings: Rings
    fades: Floats


def init(inputs: PolicyInputs) -> ClassLruState:
    """Return zeros, and no residents."""
    rings = empty_rings(inputs.num_ids, len(inputs.capacity) * CLASSES)
    zeros = np.zeros(inputs.num_ids, np.int64)
    return ClassLruState(np.zeros(inputs.num_ids), zeros, zeros.copy(), rings, FADES)


@jit
def on_admit(policy: ClassLruState, cache: CacheState, expert: int) -> None:
    """Decay the frequency, count the use, and add the expert to its class."""
    age = min(cache.clock[Clock.STEP] - policy.step[expert], len(policy.fades) - 1)
    frequency = policy.frequency[expert] * policy.fades[unsigned(age)] + 1
    policy.frequency[expert] = frequency
    policy.step[expert], policy.event[expert] = cache.clock[Clock.STEP], cache.clock[Clock.EVENT]
    ring = cache.experts[Expert.POOL, expert] * CLASSES + min(int(np.log2(frequency)), CLASSES - 1)
    link(policy.rings, cache, unsigned(cache.experts.shape[1] + ring), expert)


@jit
def on_evict(policy: ClassLruState, cache: CacheState, expert: int) -> None:
    """Remove an expert from its class."""
    unlink(policy.rings, expert)


@jit
def on_hit(policy: ClassLruState, cache: CacheState, expert: int) -> None:
    """Count a use of a resident."""
    on_evict(policy, cache, expert)
    on_admit(policy, cache, expert)


@jit
def victim(policy: ClassLruState, cache: CacheState, pool: int) -> int:
    """Return the resident with the largest slowed age."""
    heads = cache.experts.shape[1]
    best, most = -1, -1
    for level in range(CLASSES):
        expert = oldest(policy.rings, cache, unsigned(heads + pool * CLASSES + level))
        if expert < heads:
            slowed = (cache.clock[Clock.EVENT] - policy.event[expert]) << (CLASSES - 1 - level)  # times 2^7: exact
            if slowed > most or (slowed == most and goes_before(cache, expert, best)):
                best, most = int(expert), slowed
    return best


HOOKS = PolicyHooks(on_hit, on_admit, on_evict, victim)
