"""moe_spac: MoE-SpAc's utilities (arXiv 2603.09983): what verified windows of drafted tokens demand, in six levels.

After a window (a step) has run a layer, each of its experts that c tokens were routed to moves from its level s to s +
1 if c - s >= 5, or to s - 1 if s - c >= 1. The victim has the lowest level; layers that have run in this window count
as level 0 until the next. The levels are also offered as scores, s/5, of the next time a layer runs, for a prefetch.
Windows must be of at least five tokens, or no level is ever left.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import IN_LAYER, LAST, LAYER, CacheState, Ints, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = True
LEVELS, UP, DOWN = 5, 5, 1


class MoeSpacState(NamedTuple):
    """The level of every expert, and room for the tokens that one layer's are routed by: ``(L*E,)`` each."""

    level: Ints
    tokens: Ints


def state(inputs: PolicyInputs) -> MoeSpacState:
    """Return level 0."""
    return MoeSpacState(np.zeros(inputs.num_ids, np.int64), np.zeros(inputs.num_ids, np.int64))


@jit
def routed(policy: MoeSpacState, cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Move the layer's experts up or down, and offer their levels as scores."""
    size = cache.experts.shape[1] // len(cache.counters)
    first = cache.now[LAYER] * size
    policy.tokens[first : first + size] = 0
    for i in range(len(experts)):
        policy.tokens[experts[i]] = tokens[i]
    for expert in range(first, first + size):
        if policy.tokens[expert] - policy.level[expert] >= UP:
            policy.level[expert] = min(policy.level[expert] + 1, LEVELS)
        elif policy.level[expert] - policy.tokens[expert] >= DOWN:
            policy.level[expert] -= 1
        cache.known[expert] = policy.level[expert] / LEVELS


@jit
def worth(policy: MoeSpacState, cache: CacheState, expert: int) -> float:
    """Return the level, 0 for a layer that has run."""
    return float(policy.level[expert]) if cache.experts[IN_LAYER, expert] > cache.now[LAYER] else 0.0


@jit
def victim(policy: MoeSpacState, cache: CacheState, pool: int) -> int:
    """Return the one of the lowest level."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


VERBS = Verbs(ignore_expert, ignore_expert, ignore_expert, victim, routed=routed)
