"""static: keep the experts that are most popular in training text; other demand passes through the last slots."""

from typing import NamedTuple

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, Floats, PolicyHooks, ignore_expert
from moe_beyond.cache.policies._scan import argmin_resident
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("profile",)
OFFERS_SCORES = False


class StaticState(NamedTuple):
    """Popularity of every expert, ``(L*E,)`` float64."""

    popularity: Floats


def init(inputs: PolicyInputs) -> StaticState:
    """Return the popularity in the training text."""
    return StaticState(inputs.popularity())


@jit
def priority(policy: StaticState, cache: CacheState, expert: int) -> float:
    """Return the popularity."""
    return policy.popularity[expert]


@jit
def victim(policy: StaticState, cache: CacheState, pool: int) -> int:
    """Return the least popular resident."""
    return argmin_resident(policy, cache, pool, priority, cache.experts[Expert.LAST_USE])


HOOKS = PolicyHooks(ignore_expert, ignore_expert, ignore_expert, victim)
