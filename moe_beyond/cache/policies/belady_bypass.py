"""belady_bypass: Belady with the choice to bypass the cache: the optimum of all policies without prefetching.

It assumes slots on top of the budget: K for a token, or the demand of a batch or chunk. A demanded expert computes in
one of them, and is admitted only if its next use is sooner than that of some resident (moe-cache-eval, arXiv
2608.07911). It can have more hits than `belady`, most with one pool per layer.
"""

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, PolicyHooks
from moe_beyond.cache.policies import belady
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ("future",)
OFFERS_SCORES = False


def init(inputs: PolicyInputs) -> belady.BeladyState:
    """Index the future by expert."""
    return belady.init(inputs)


@jit
def admit(policy: belady.BeladyState, cache: CacheState, expert: int, victim: int) -> bool:
    """Admit an expert whose next use is sooner than the victim's."""
    return belady.next_use(policy, cache, expert) < belady.next_use(policy, cache, victim)


HOOKS = PolicyHooks(belady.on_hit, belady.on_admit, belady.on_evict, belady.victim, admit=admit, bypass=True)
