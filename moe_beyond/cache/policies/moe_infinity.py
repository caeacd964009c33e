"""moe_infinity: MoE-Infinity's eviction (arXiv 2401.14361): keep the experts of the matched matrix, early layers first.

The victim has the lowest (p + epsilon) * (1 - layer/L), where p is the expert's last score. With the predictor ``eamc``
it is the share of tokens that use the expert in the matched matrix. A prefetch with a lower priority than its victim is
not admitted.
"""

from typing import NamedTuple

import numpy as np

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, Floats, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("scores",)
OFFERS_SCORES = False
EPSILON = 1e-8


class MoeInfinityState(NamedTuple):
    """Last score of every expert, ``(L*E,)`` float64."""

    score: Floats


def init(inputs: PolicyInputs) -> MoeInfinityState:
    """Return zeros."""
    return MoeInfinityState(np.zeros(inputs.num_ids))


@jit
def on_scores(policy: MoeInfinityState, cache: CacheState, layer: int) -> None:
    """Store the scores of a layer."""
    experts = cache.experts.shape[1] // len(cache.counters)
    for expert in range(layer * experts, (layer + 1) * experts):
        policy.score[expert] = cache.scores[expert]


@jit
def priority(policy: MoeInfinityState, cache: CacheState, expert: int) -> float:
    """Return the score, weighted by the layer."""
    return (policy.score[expert] + EPSILON) * (1 - cache.experts[Expert.LAYER, expert] / len(cache.counters))


@jit
def victim(policy: MoeInfinityState, cache: CacheState, pool: int) -> int:
    """Return the resident with the lowest priority."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


@jit
def admit(policy: MoeInfinityState, cache: CacheState, expert: int, victim: int) -> bool:
    """Admit an expert with a higher priority than the victim."""
    return priority(policy, cache, expert) > priority(policy, cache, victim)


HOOKS = PolicyHooks(ignore_expert, ignore_expert, ignore_expert, victim, on_scores=on_scores, admit=admit)
