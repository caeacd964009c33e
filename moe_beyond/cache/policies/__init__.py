"""Eviction policies: the rules that choose which expert to evict, one file each.

A policy is a module, or an object with the same attributes:

- ``init(inputs)`` returns its arrays for a cold cache; ``inputs`` is a `moe_beyond.cache.policy_inputs.PolicyInputs`.
- ``HOOKS`` holds its compiled functions, a `moe_beyond.cache.core.PolicyHooks`.
- ``NEEDS`` names the inputs that it cannot do without: some of ``"future"``, ``"profile"`` and ``"scores"``.
- ``OFFERS_SCORES`` is True if it writes scores of its own for a prefetcher.

Another package adds a policy with ``POLICIES.register("name", policy)``, or with an entry point of the group
``moe_beyond.policies``. `moe_beyond.testing.check_policy` tests it.
"""

from typing import Any, Protocol

from moe_beyond.errors import UserError
from moe_beyond.registry import Registry

__all__ = ["NEEDS", "POLICIES", "SUMMARIES", "Policy", "load_policy", "policy_summaries"]

NEEDS = ("future", "profile", "scores")
"""Inputs that a policy may need."""


class Policy(Protocol):
    """Attributes of a policy.

    Attributes:
        HOOKS: Compiled functions, a `moe_beyond.cache.core.PolicyHooks`.
        NEEDS: Names of required inputs, some of `moe_beyond.cache.policies.NEEDS`.
        OFFERS_SCORES: Whether the policy writes scores that a prefetcher can read.
    """

    HOOKS: Any
    NEEDS: tuple[str, ...]
    OFFERS_SCORES: bool

    def init(self, inputs: Any, /) -> Any:
        """Return the policy's arrays for a cold cache, a NamedTuple of NumPy arrays and numbers."""


SUMMARIES = {
    "lru": "least recently used",
    "lfu": "least frequently used in the sequence",
    "lfu_in_cache": "least frequently used since it was admitted",
    "lfru": "fewest uses per event since the last use (vLLM)",
    "class_lru": "oldest by age, slowed down for frequent use (llama.cpp)",
    "static": "least popular in training text",
    "least_stale": "not used in this step, and its layer runs last (SpecMD)",
    "moe_infinity": "lowest matched score, later layers first (MoE-Infinity)",
    "moe_spac": "lowest utility level of verified windows (MoE-SpAc)",
    "hobbit": "lowest mix of recency, frequency and layer distance (HOBBIT)",
    "belief": "most events per expected hit, from scores and history",
    "belady": "next use is farthest in the future; the optimum that admits every demand",
    "belady_bypass": "Belady that may bypass the cache; the optimum of all policies",
}
"""Name -> the expert that the policy evicts, in one line; a new policy needs its file and one line here."""

POLICIES: Registry[Policy] = Registry(
    "policy", "moe_beyond.policies", {name: f"moe_beyond.cache.policies.{name}" for name in SUMMARIES}
)
"""Policies by name; a policy's module is imported when its entry is read."""


def policy_summaries() -> dict[str, str]:
    """Return one line per policy name for help; no policy is imported."""
    return {name: SUMMARIES.get(name, f"a policy of package {POLICIES.package(name)}") for name in POLICIES}


def load_policy(name: str) -> Policy:
    """Return a policy with all attributes that a replay reads.

    Args:
        name: Name of a registered policy.

    Raises:
        UserError: There is no such policy, or it lacks an attribute.
    """
    policy = POLICIES[name]
    for attribute in ("init", "HOOKS", "NEEDS", "OFFERS_SCORES"):
        if not hasattr(policy, attribute):
            raise UserError(f"policy {name}: has no {attribute}; see moe_beyond.cache.policies")
    if unknown_needs := [need for need in policy.NEEDS if need not in NEEDS]:
        raise UserError(f"policy {name}: NEEDS must name some of {', '.join(NEEDS)} (got {unknown_needs[0]!r})")
    return policy
