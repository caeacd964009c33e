"""Eviction policies, one file each: what it needs, its arrays (`state`), and its compiled verbs (`VERBS`)."""

import importlib
from types import ModuleType

from moe_beyond.errors import unknown

POLICIES = (
    "lru",
    "lfu",
    "lfu_in_cache",
    "lfru",
    "class_lru",
    "static",
    "least_stale",
    "moe_infinity",
    "moe_spac",
    "hobbit",
    "belief",
    "belady",
    "belady_bypass",
)


def load_policy(name: str) -> ModuleType:
    """Return a policy's module.

    It has ``state(inputs)``, ``VERBS``, ``NEEDS``, which holds some of "future", "profile" and "scores", and
    ``OFFERS_SCORES``, whether it writes some of its own for a prefetcher.

    Raises:
        UserError: There is no such policy.
    """
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    return importlib.import_module(f"moe_beyond.cache.policies.{name}")
