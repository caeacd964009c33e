"""The systems of the field as strategies, as far as traces of expert ids allow."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from moe_beyond.errors import unknown
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import Quotas, evenly, strategy
from moe_beyond.pretrained import NotInstalledError
from moe_beyond.simulator import ReplaySettings


@dataclass(frozen=True)
class System:
    """A strategy with a name.

    Attributes:
        policy: Its eviction policy.
        prefetch: Its prefetcher; ``{k}`` stands for the model's top-k.
        on_device: Its prefetcher on a device, where that differs.
        architecture: The published predictor that it uses, or None.
        released: Whether it is the published MoE-Beyond, which reads scores of lookahead 0.
        needs_device: Whether it is a matter of time alone.
        window: Drafted tokens that it verifies together.
        note: What stands in for what, for tables.
    """

    policy: str
    prefetch: str = "none"
    on_device: str | None = None
    architecture: str | None = None
    released: bool = False
    needs_device: bool = False
    window: int = 1
    note: str | None = None


# The thresholds of `ours` were tuned on held-out Puffin text (tools/experiments.md).
SYSTEMS: dict[str, System] = {
    "ours": System(
        "belief",
        "p>0.24",  # most hits for at most the demanded bytes, at a tenth of the experts
        on_device="p>0.6",  # most tokens a second
        architecture="cross_layer",
        note="with the published history profile, unless --profile names another",
    ),
    "moe-beyond": System("lru", "top{k}", released=True, note="as published: its scores read the router's own input"),
    "moe-infinity": System("moe_infinity", "moe_infinity", architecture="eamc"),
    "specmd": System(
        "least_stale",
        "p>0.5",
        architecture="cross_layer",
        note="cross_layer stands in for router scores of hidden states",
    ),
    "moe-spac": System("moe_spac", "p>0", window=8, note="drafting is free and always right; no CPU computes"),
    "od-moe": System("od_moe", needs_device=True),
    "llama.cpp": System("class_lru"),
}
"""Name -> system; see reference papers in `moe_beyond.cache.policies`."""


@dataclass(frozen=True)
class Unavailable:
    """A strategy that lacks something: its name, and what."""

    strategy: str
    why: str


def system_names(asked: Iterable[str]) -> list[str]:
    """Resolve what ``--strategy`` says: names, or ``all``.

    Raises:
        UserError: There is no such strategy.
    """
    names = list(asked)
    for name in names:
        if name not in (*SYSTEMS, "all"):
            raise unknown("strategy", name, (*SYSTEMS, "all"))
    return list(SYSTEMS) if "all" in names else list(dict.fromkeys(names))


def system_strategies(
    names: Iterable[str],
    common: ReplaySettings,
    slots: Iterable[int],
    top_k: int,
    given: ScoreSource | None,
    published: Callable[[str], ScoreSource | None],
    quotas: Quotas = evenly,
) -> tuple[list[ReplaySettings], list[ScoreSource], list[Unavailable]]:
    """Make the strategies of named systems at every budget.

    Args:
        names: Of systems.
        common: What all share.
        slots: Budgets.
        top_k: The model's.
        given: Scores that the user named; they serve the released MoE-Beyond if they have lookahead 0.
        published: Finds the published predictor of an architecture for these traces, or None.
        quotas: Slots of each layer.

    Returns:
        The strategies, the sources of their scores, and those that are not available.
    """
    found: list[ReplaySettings] = []
    sources: dict[str, ScoreSource] = {}
    missing: list[Unavailable] = []
    budgets = list(dict.fromkeys(slots))
    for name in names:
        system = SYSTEMS[name]
        source = None
        if system.released:
            source = given if given is not None and 0 in given.lookaheads else None
            if source is None:
                missing.append(Unavailable(name, "needs the released predictions: --scores of lookahead 0"))
                continue
        elif system.architecture is not None:
            try:
                source = published(system.architecture)
            except NotInstalledError as error:
                missing.append(Unavailable(name, str(error)))
                continue
            if source is None:
                why = f"no published {system.architecture} predictor is for this model and tokenizer"
                missing.append(Unavailable(name, why))
                continue
        if system.needs_device and common.device is None:
            missing.append(Unavailable(name, "a matter of time alone: needs --device"))
            continue
        if source is not None:
            sources[source.name] = source
        prefetch = system.prefetch if common.device is None else system.on_device or system.prefetch
        shared = replace(common, window=max(system.window, common.window), note=system.note)
        found += [
            strategy(shared, budget, system.policy, prefetch.format(k=top_k), source, quotas=quotas, name=name)
            for budget in budgets
        ]
    return found, list(sources.values()), missing
