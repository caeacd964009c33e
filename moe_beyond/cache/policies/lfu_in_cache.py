"""lfu_in_cache: evict what was used least often since it came in. Ties go by recency.

A larger budget can have fewer hits: the counts that decide are of other stays.
"""

from moe_beyond.cache.core import CacheState, Verbs
from moe_beyond.cache.jit import jit
from moe_beyond.cache.policies import lfu
from moe_beyond.cache.policy_inputs import PolicyInputs

NEEDS: tuple[str, ...] = ()
OFFERS_SCORES = False


def state(inputs: PolicyInputs) -> lfu.LfuState:
    """Return zero counts."""
    return lfu.state(inputs)


@jit
def evict(policy: lfu.LfuState, cache: CacheState, expert: int) -> None:
    """Forget the count."""
    policy.uses[expert] = 0


VERBS = Verbs(lfu.use, lfu.use, evict, lfu.victim)
