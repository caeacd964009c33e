"""Registry of strategies by name: published systems, as far as traces of expert ids allow, and this project's own.

A strategy is added in one place: here, or by another package through `STRATEGIES.register` or the entry-point group
``moe_beyond.strategies``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_beyond.errors import unknown
from moe_beyond.registry import Registry

ALL = "all"
"""Value of ``--strategy`` that selects every strategy."""


@dataclass(frozen=True)
class NamedStrategy:
    """A policy and a prefetcher under one name.

    Attributes:
        policy: Name of an eviction policy, or of a bound in `moe_beyond.simulator.BOUNDS`.
        prefetch: Prefetcher; ``{k}`` is replaced by the model's top-k (default: none).
        on_device: Prefetcher with a device, if it differs (default: ``prefetch``).
        architecture: Architecture of the pretrained predictor that it uses (default: no predictor).
        released: Whether it uses the released predictions of MoE-Beyond, with lookahead 0 (default: False).
        needs_device: Whether it is defined only with a device (default: False).
        misses: Miss handling on a device whose host computes. Without one, a strategy that needs a device is
            unavailable, and others move every miss (default: ``"move"``).
        warm_start: Whether every sequence starts with the most popular experts (default: False).
        window: Drafted tokens that are verified together (default: 1).
        note: Substitutions and assumptions, for tables (default: none).
    """

    policy: str
    prefetch: str = "none"
    on_device: str | None = None
    architecture: str | None = None
    released: bool = False
    needs_device: bool = False
    misses: str = "move"
    warm_start: bool = False
    window: int = 1
    note: str | None = None


STRATEGIES: Registry[NamedStrategy] = Registry("strategy", "moe_beyond.strategies", {})
"""Name -> strategy; `moe_beyond.cache.policies` cites the papers."""

# The thresholds of belief-cross-layer were tuned on held-out Puffin text (tools/experiments.md).
for _name, _strategy in {
    "belief-cross-layer": NamedStrategy(
        "belief",
        "p>0.24",  # highest hit rate for at most the demanded bytes, at a tenth of the experts
        on_device="p>0.6",  # highest tokens per second
        architecture="cross_layer",
        note="with the pretrained history profile, unless --profile names another",
    ),
    "moe-beyond": NamedStrategy(
        "lru", "top{k}", released=True, note="as published: its scores read the router's own input"
    ),
    "moe-infinity": NamedStrategy("moe_infinity", "moe_infinity", architecture="eamc"),
    "specmd": NamedStrategy(
        "least_stale",
        "p>0.5",
        architecture="cross_layer",
        note="cross_layer replaces its router scores of hidden states",
    ),
    "moe-spac": NamedStrategy(
        "moe_spac",
        "p>0",
        misses="cpu",
        window=8,
        note="drafting is free and always right; the CPU computes misses if the device has host_gb_per_s",
    ),
    "od-moe": NamedStrategy("od_moe", needs_device=True),
    "llama.cpp": NamedStrategy("class_lru"),
    "llama.cpp-cpu": NamedStrategy(
        "class_lru",
        needs_device=True,
        misses="cpu",
        note="the CPU computes misses and the cache follows on an idle interconnect (ggml-org/llama.cpp#24524, #26563)",
    ),
    "fiddler": NamedStrategy(
        "static",
        needs_device=True,
        misses="best",
        warm_start=True,
        note="popular experts stay; the CPU computes the others, unless a copy is sooner (arXiv 2402.07033)",
    ),
    "hybrimoe": NamedStrategy(
        "class_lru",
        "p>0.5",
        on_device="adaptive",
        architecture="cross_layer",
        needs_device=True,
        misses="best",
        note="cross_layer replaces its next-layer gates, class_lru its average of router scores (arXiv 2504.05897)",
    ),
}.items():
    STRATEGIES.register(_name, _strategy)


def strategy_names(selected: Iterable[str]) -> list[str]:
    """Resolve values of ``--strategy``.

    Args:
        selected: Names of strategies, or ``all``.

    Returns:
        Each name once: in the given order, or all in the registry's order.

    Raises:
        UserError: A name is not registered.
    """
    names = list(selected)
    for name in names:
        if name != ALL and name not in STRATEGIES:
            raise unknown(STRATEGIES.kind, name, (*STRATEGIES, ALL))
    return list(STRATEGIES) if ALL in names else list(dict.fromkeys(names))
