"""static: keep the experts that are most popular in training text; other demand passes through the last slots.

An expert that the host has computed does not pass through: it replaces less popular ones only.
"""

from typing import NamedTuple

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, Expert, Floats, PolicyHooks, ignore_expert
from moe_beyond.cache.interconnect import Queue, Waits
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


@jit
def admit(policy: StaticState, cache: CacheState, expert: int, victim: int) -> bool:
    """Return whether a prefetched expert may replace the victim; a fill may if it is more popular."""
    is_fill = cache.link.queue[Queue.WAITS, expert] == Waits.FILL
    return not is_fill or policy.popularity[expert] > policy.popularity[victim]


HOOKS = PolicyHooks(ignore_expert, ignore_expert, ignore_expert, victim, admit=admit)
