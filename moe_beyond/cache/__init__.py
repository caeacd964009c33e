"""The cache core: one state machine for replay and runtime, with policies and prefetchers; NumPy and numba only.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.cache.counters import COUNTERS
from moe_beyond.cache.policies import POLICIES, load_policy, policy_summaries
from moe_beyond.cache.prefetchers import PREFETCHERS, Prefetch, parse_prefetch
from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.cache.cache import Cache, EventCounts, Wave, available_layers, prefetch_moments
    from moe_beyond.cache.compiler import jit
    from moe_beyond.cache.core import CacheState, Clock, Expert, PolicyHooks, Pool, admit_all, ignore_expert, is_pinned
    from moe_beyond.cache.policies._scan import argmin_resident
    from moe_beyond.cache.policy_inputs import PolicyInputs

__all__ = [
    "COUNTERS",
    "POLICIES",
    "PREFETCHERS",
    "Cache",
    "CacheState",
    "Clock",
    "EventCounts",
    "Expert",
    "PolicyHooks",
    "PolicyInputs",
    "Pool",
    "Prefetch",
    "Wave",
    "admit_all",
    "argmin_resident",
    "available_layers",
    "ignore_expert",
    "is_pinned",
    "jit",
    "load_policy",
    "parse_prefetch",
    "policy_summaries",
    "prefetch_moments",
]

_COMPILED = {
    "Cache": "cache",
    "CacheState": "core",
    "Clock": "core",
    "EventCounts": "cache",
    "Expert": "core",
    "Pool": "core",
    "PolicyHooks": "core",
    "PolicyInputs": "policy_inputs",
    "Wave": "cache",
    "admit_all": "core",
    "argmin_resident": "policies._scan",
    "available_layers": "cache",
    "ignore_expert": "core",
    "is_pinned": "core",
    "jit": "compiler",
    "prefetch_moments": "cache",
}
"""Public name -> module that is imported when the name is first read, because it imports numba."""

__getattr__, __dir__ = lazy_exports(__name__, _COMPILED)
