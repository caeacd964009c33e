"""Eviction policies, one file each; a file makes its arrays in `state` and gives four compiled verbs."""

import importlib
from types import ModuleType

from moe_beyond.errors import unknown

POLICIES = ("lru", "lfu", "belady")


def load_policy(name: str) -> ModuleType:
    """Return a policy's module, with ``state(num_ids, pools, future)`` and ``VERBS``.

    Raises:
        UserError: There is no such policy.
    """
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    return importlib.import_module(f"moe_beyond.cache.policies.{name}")
