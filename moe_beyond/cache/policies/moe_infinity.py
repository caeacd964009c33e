"""moe_infinity: MoE-Infinity's eviction (arXiv 2401.14361): keep what the matched matrix uses, early layers first.

The victim has the least (p + epsilon) * (1 - layer/L), where p is the last score that was known of the expert: the
share of tokens that use it in the matrix that the predictor ``eamc`` matches. A prefetch that is worth less is not
made.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.core import IN_LAYER, LAST, CacheState, Floats, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("scores",)
OFFERS_SCORES = False
EPSILON = 1e-8


class MoeInfinityState(NamedTuple):
    """The last known score of every expert, ``(L*E,)``."""

    score: Floats


def state(inputs: PolicyInputs) -> MoeInfinityState:
    """Return zeros."""
    return MoeInfinityState(np.zeros(inputs.num_ids))


@jit
def learned(policy: MoeInfinityState, cache: CacheState, layer: int) -> None:
    """Note the scores."""
    experts = cache.experts.shape[1] // len(cache.counters)
    for expert in range(layer * experts, (layer + 1) * experts):
        policy.score[expert] = cache.known[expert]


@jit
def worth(policy: MoeInfinityState, cache: CacheState, expert: int) -> float:
    """Return the priority."""
    return (policy.score[expert] + EPSILON) * (1 - cache.experts[IN_LAYER, expert] / len(cache.counters))


@jit
def victim(policy: MoeInfinityState, cache: CacheState, pool: int) -> int:
    """Return the one of least priority."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


@jit
def admits(policy: MoeInfinityState, cache: CacheState, expert: int, victim: int) -> bool:
    """Let in what is worth more."""
    return worth(policy, cache, expert) > worth(policy, cache, victim)


VERBS = Verbs(ignore_expert, ignore_expert, ignore_expert, victim, learned=learned, admits=admits)
