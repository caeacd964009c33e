"""static: the experts that were most popular in training stay; what else is demanded passes through the last slots."""

from typing import NamedTuple

from moe_beyond.cache.core import LAST, CacheState, Floats, Verbs, ignore_expert
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies.scan import least
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("profile",)
OFFERS_SCORES = False


class StaticState(NamedTuple):
    """The popularity of every expert, ``(L*E,)``."""

    popularity: Floats


def state(inputs: PolicyInputs) -> StaticState:
    """Take the popularity of the training text."""
    return StaticState(inputs.popularity())


@jit
def worth(policy: StaticState, cache: CacheState, expert: int) -> float:
    """Return the popularity."""
    return policy.popularity[expert]


@jit
def victim(policy: StaticState, cache: CacheState, pool: int) -> int:
    """Return the least popular."""
    return least(policy, cache, pool, worth, cache.experts[LAST])


VERBS = Verbs(ignore_expert, ignore_expert, ignore_expert, victim)
