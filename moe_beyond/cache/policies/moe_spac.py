"""moe_spac: MoE-SpAc's utilities (arXiv 2603.09983): the demand of verified windows of drafted tokens, in six levels.

A window (a step) runs a layer and changes the levels of its experts. An expert with c tokens moves from its level s to
s + 1 if c - s >= 5, or to s - 1 if s - c >= 1. The victim has the lowest level; layers that have run in this window
count as level 0 until the next window. The levels are also offered to a prefetcher as scores s/5 of the layer's next
run. Windows must have at least five tokens, or no expert leaves level 0.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = True
LEVELS, UP, DOWN = 5, 5, 1


class MoeSpacState(NamedTuple):
    """Level of every expert, and work space for the tokens of one layer, ``(L*E,)`` int64 each."""

    level: Ints
    tokens: Ints


def init(inputs: PolicyInputs) -> MoeSpacState:
    """Return level 0 for all experts."""
    return MoeSpacState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def on_demand(policy: MoeSpacState, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Move the layer's experts up or down, and offer their levels as scores."""
    size = cache.experts.shape[1] // len(cache.counters)
    first = cache.clock[Clock.LAYER] * size
    policy.tokens[first : first + size] = 0
    for i in range(len(experts)):
        policy.tokens[experts[i]] = tokens[i]
    for expert in range(first, first + size):
        if policy.tokens[expert] - policy.level[expert] >= UP:
            policy.level[expert] = min(policy.level[expert] + 1, LEVELS)
        elif policy.level[expert] - policy.tokens[expert] >= DOWN:
            policy.level[expert] -= 1
        cache.scores[expert] = policy.level[expert] / LEVELS


@jit
def priority(policy: MoeSpacState, cache: CacheState, expert: int) -> float:
    """Return the level, 0 for a layer that has run."""
    return float(policy.level[expert]) if cache.experts[Expert.LAYER, expert] > cache.clock[Clock.LAYER] else 0.0


@jit
def victim(policy: MoeSpacState, cache: CacheState, pool: int) -> int:
    """Return the resident with the lowest level."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(ignore_expert, ignore_expert, ignore_expert, victim, on_demand=on_demand)
