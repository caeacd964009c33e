"""class_lru: llama.cpp's ClassLRU (ggml-org/llama.cpp#31233): recency, slowed down for what is used often.

An expert's frequency fades by half every 128 tokens: F <- F * 2^(-tokens/128) + 1 at each use, kept across evictions.
Its class is floor(log2 F), within 0..7, as of its last use. The victim has the largest age / 2^class, age in events.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import EVENT, LAST, STEP, CacheState, Floats, Ints, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False
HALF_LIFE, CLASSES = 128.0, 8


class ClassLruState(NamedTuple):
    """Of every expert ``(L*E,)``: its faded frequency, and step, event and class of its last use."""

    frequency: Floats
    step: Ints
    event: Ints
    level: Ints


def state(inputs: PolicyInputs) -> ClassLruState:
    """Return zeros."""
    return ClassLruState(np.zeros(inputs.num_ids), *(np.zeros(inputs.num_ids, np.int64) for _ in range(3)))


@jit
def use(policy: ClassLruState, cache: CacheState, expert: int) -> None:
    """Fade, count, and put into its class."""
    faded = policy.frequency[expert] * 2.0 ** ((policy.step[expert] - cache.now[STEP]) / HALF_LIFE)
    policy.frequency[expert] = faded + 1
    policy.step[expert], policy.event[expert] = cache.now[STEP], cache.now[EVENT]
    policy.level[expert] = min(int(np.log2(faded + 1)), CLASSES - 1)


@jit
def worth(policy: ClassLruState, cache: CacheState, expert: int) -> float:
    """Return minus the slowed age."""
    return (policy.event[expert] - cache.now[EVENT]) / 2.0 ** policy.level[expert]


@jit
def victim(policy: ClassLruState, cache: CacheState, pool: int) -> int:
    """Return the oldest, by slowed age."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


VERBS = Verbs(use, use, ignore_expert, victim)
