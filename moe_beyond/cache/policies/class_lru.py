"""class_lru: llama.cpp's ClassLRU (ggml-org/llama.cpp#31233): recency, slowed down for frequently used experts.

An expert's frequency halves every 128 tokens: F <- F * 2^(-tokens/128) + 1 at each use, kept across evictions. Its
class is floor(log2 F), within 0..7, at its last use. The victim has the largest age / 2^class, with the age in events.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Floats, Ints, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False
HALF_LIFE, CLASSES = 128.0, 8


class ClassLruState(NamedTuple):
    """Decayed frequency of every expert, and step, event and class of its last use, ``(L*E,)`` each."""

    frequency: Floats
    step: Ints
    event: Ints
    level: Ints


def init(inputs: PolicyInputs) -> ClassLruState:
    """Return zeros."""
    return ClassLruState(np.zeros(inputs.num_ids), *(np.zeros(inputs.num_ids, np.int64) for _ in range(3)))


@jit
def use(policy: ClassLruState, cache: CacheState, expert: int) -> None:
    """Decay the frequency, count the use, and set the class."""
    age = policy.step[expert] - cache.clock[Clock.STEP]
    decayed = policy.frequency[expert] * 2.0 ** (age / HALF_LIFE)
    policy.frequency[expert] = decayed + 1
    policy.step[expert], policy.event[expert] = cache.clock[Clock.STEP], cache.clock[Clock.EVENT]
    policy.level[expert] = min(int(np.log2(decayed + 1)), CLASSES - 1)


@jit
def priority(policy: ClassLruState, cache: CacheState, expert: int) -> float:
    """Return the negative slowed age."""
    return (policy.event[expert] - cache.clock[Clock.EVENT]) / 2.0 ** policy.level[expert]


@jit
def victim(policy: ClassLruState, cache: CacheState, pool: int) -> int:
    """Return the resident with the largest slowed age."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(use, use, ignore_expert, victim)
