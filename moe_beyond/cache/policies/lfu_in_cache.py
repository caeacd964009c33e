"""lfu_in_cache: evict the expert that was used least often since it was admitted. Ties go by recency.

A larger budget can have fewer hits, because the counts then cover other stays in the cache.
"""

from moe_beyond.cache.compiler import jit
from moe_beyond.cache.core import CacheState, PolicyHooks
from moe_beyond.cache.policies import lfu
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


def init(inputs: PolicyInputs) -> lfu.LfuState:
    """Return zero counts."""
    return lfu.init(inputs)


@jit
def on_evict(policy: lfu.LfuState, cache: CacheState, expert: int) -> None:
    """Remove an expert from the residents, and reset its count."""
    lfu.on_evict(policy, cache, expert)
    policy.uses[expert] = 0


HOOKS = PolicyHooks(lfu.on_hit, lfu.on_admit, on_evict, lfu.victim)
