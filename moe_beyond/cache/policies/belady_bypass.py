"""belady_bypass: Belady, free to retain nothing of what is demanded: the optimum of all policies without prefetch.

It assumes staging slots on top of the budget: K for a token, as many as a batch or a chunk demands. A demanded
expert computes there, and is retained only if it is used again sooner than some resident (moe-cache-eval, arXiv
2608.07911). So it can have more hits than `belady`, most with a pool for each layer.
"""

from moe_beyond.cache.core import CacheState, Verbs
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies import belady
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("future",)
OFFERS_SCORES = False


def state(inputs: PolicyInputs) -> belady.BeladyState:
    """Index the future by expert."""
    return belady.state(inputs)


@jit
def admits(policy: belady.BeladyState, cache: CacheState, expert: int, victim: int) -> bool:
    """Retain what is used again sooner."""
    return belady.next_use(policy, cache, expert) < belady.next_use(policy, cache, victim)


VERBS = Verbs(belady.hit, belady.insert, belady.evict, belady.victim, admits=admits, stages=True)
