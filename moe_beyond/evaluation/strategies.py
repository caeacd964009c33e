"""Settings of strategies: single ones, grids, named strategies, and the baselines of every result."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from moe_beyond.cache.misses import MOVE
from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.errors import UserError
from moe_beyond.evaluation.named_strategies import STRATEGIES
from moe_beyond.evaluation.results import Unavailable
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.pretrained import NotInstalledError
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.computing import check_host
from moe_beyond.simulator.settings import reads_scores

BASELINES = ("lru", "belady")
"""Policies shown next to every result, without prefetching: the usual choice, and the optimum for whole sequences among
policies that must admit every demanded expert."""

HINDSIGHT = "static_hindsight"
"""Third baseline: the best static choice, known only afterwards."""

CLAIRVOYANT = "clairvoyant prefetch"
"""Name of the baseline on a device that prefetches the next demanded experts."""

Quotas = Callable[[int], tuple[int, ...] | None]
"""Function from the number of slots to the slots of each layer; None splits the slots evenly."""


def even_split(slots: int) -> None:
    """Split slots evenly."""


def strategy(
    common: ReplaySettings,
    slots: int,
    policy: str,
    prefetch: str = "none",
    source: ScoreSource | None = None,
    lookahead: Lookahead | None = None,
    quotas: Quotas = even_split,
    name: str | None = None,
) -> ReplaySettings:
    """Make the settings of one strategy.

    Args:
        common: Settings shared with other strategies.
        slots: Number of slots.
        policy: Name of the eviction policy.
        prefetch: Prefetcher (default: none).
        source: Source of scores, for policies and prefetchers that read any (default: none).
        lookahead: Lookahead of the scores that ``top<m>`` and ``p><t>`` select by (default: the first of the source).
        quotas: Slots of each layer (default: an even split).
        name: Name of the strategy (default: policy and prefetcher).

    Raises:
        UserError: The prefetcher cannot be read, or two settings exclude each other.
    """
    prefetcher = parse_prefetch(prefetch).prefetcher
    scores: dict[str, Any] = {}
    if source is not None and (reads_scores(policy) or prefetcher.reads_scores):
        scores = {
            "lookahead": None
            if not prefetcher.reads_one_lookahead
            else source.lookaheads[0]
            if lookahead is None
            else lookahead,
            "lookaheads": source.lookaheads,
            "predictor": source.name,
            "causal": source.causal,
            "note": source.note,
        }
    return replace(common, slots=slots, policy=policy, quotas=quotas(slots), prefetch=prefetch, name=name, **scores)


def grid(
    common: ReplaySettings,
    slots: Iterable[int],
    policies: Sequence[str],
    prefetches: Sequence[str] = ("none",),
    source: ScoreSource | None = None,
    lookaheads: Sequence[Lookahead] = (),
    quotas: Quotas = even_split,
    misses: Sequence[str] = (MOVE,),
) -> list[ReplaySettings]:
    """List every combination of budget, policy, prefetcher, lookahead (if it selects by one) and miss handling.

    Args:
        common: Settings shared by all.
        slots: Numbers of slots.
        policies: Names of eviction policies.
        prefetches: Prefetchers (default: none).
        source: Source of scores (default: none).
        lookaheads: Lookaheads to select by (default: the first of the source).
        quotas: Slots of each layer (default: an even split).
        misses: Miss handlings (default: move).

    Raises:
        UserError: A prefetcher cannot be read, or needs scores that are missing.
    """
    settings = []
    for budget in dict.fromkeys(slots):
        for policy in policies:
            for prefetch in prefetches:
                by_lookahead = parse_prefetch(prefetch).prefetcher.reads_one_lookahead and source is not None
                for lookahead in (lookaheads or (None,)) if by_lookahead else (None,):
                    for handling in misses:
                        shared = replace(common, misses=handling)
                        settings.append(strategy(shared, budget, policy, prefetch, source, lookahead, quotas))
    return list(dict.fromkeys(settings))


def named_strategies(
    names: Iterable[str],
    common: ReplaySettings,
    slots: Iterable[int],
    top_k: int,
    user_source: ScoreSource | None,
    pretrained: Callable[[str], ScoreSource | None],
    quotas: Quotas = even_split,
    *,
    has_profile: bool = False,
) -> tuple[list[ReplaySettings], list[ScoreSource], list[Unavailable]]:
    """Make the settings of named strategies at every budget.

    Args:
        names: Registered names of strategies.
        common: Settings shared by all.
        slots: Numbers of slots.
        top_k: Experts per token and layer of the model.
        user_source: Scores that the user named; used as the released MoE-Beyond predictions if they have lookahead 0.
        pretrained: Function from an architecture to the scores of its pretrained predictor for these traces; None if
            there is no such predictor.
        quotas: Slots of each layer (default: an even split).
        has_profile: Whether there is a usage profile (default: False).

    Returns:
        Settings, the sources of their scores, and the strategies that are unavailable.
    """
    settings: list[ReplaySettings] = []
    sources: dict[str, ScoreSource] = {}
    unavailable: list[Unavailable] = []
    budgets = list(dict.fromkeys(slots))
    for name in names:
        named = STRATEGIES[name]
        source = None
        if named.released:
            source = user_source if user_source is not None and 0 in user_source.lookaheads else None
            if source is None:
                unavailable.append(Unavailable(name, "needs the released predictions; give --scores of lookahead 0"))
                continue
        elif named.architecture is not None:
            try:
                source = pretrained(named.architecture)
            except NotInstalledError as error:
                unavailable.append(Unavailable(name, str(error)))
                continue
            if source is None:
                reason = f"no pretrained {named.architecture} predictor fits this model and tokenizer"
                unavailable.append(Unavailable(name, reason))
                continue
        if named.needs_device and common.device is None:
            unavailable.append(Unavailable(name, "is defined only by time; give --device"))
            continue
        if named.warm_start and not has_profile:
            reason = "needs the popularity of experts in training text; give --profile"
            unavailable.append(Unavailable(name, reason))
            continue
        misses = named.misses
        try:
            if misses != MOVE:
                check_host(common.device, misses)
        except UserError as error:
            if named.needs_device:
                unavailable.append(Unavailable(name, str(error)))
                continue
            misses = MOVE
        if source is not None:
            sources[source.name] = source
        prefetch = named.prefetch if common.device is None else named.on_device or named.prefetch
        shared = replace(
            common,
            window=max(named.window, common.window),
            note=named.note,
            misses=misses,
            warm_start=named.warm_start or common.warm_start,
        )
        settings += [
            strategy(shared, budget, named.policy, prefetch.format(k=top_k), source, quotas=quotas, name=name)
            for budget in budgets
        ]
    return settings, list(sources.values()), unavailable


def lru_in_windows(
    strategies: Iterable[ReplaySettings], cold: ReplaySettings, slots: int, quotas: Quotas = even_split
) -> list[ReplaySettings]:
    """List LRU with the window of every strategy whose window is wider than the common one.

    A window loads an expert once for all its tokens, whatever the policy, so LRU token by token is no comparison.

    Args:
        strategies: Settings of the strategies.
        cold: Settings shared by all baselines.
        slots: Number of slots.
        quotas: Slots of each layer (default: an even split).
    """
    windows = dict.fromkeys(settings.window for settings in strategies if settings.window > cold.window)
    return [
        strategy(replace(cold, window=window), slots, "lru", quotas=quotas, name=f"lru, window {window}")
        for window in windows
    ]


def clairvoyant(cold: ReplaySettings, slots: int, quotas: Quotas = even_split) -> ReplaySettings:
    """Make the settings of prefetching by the next demands: near the optimum of a device, but no bound."""
    return strategy(cold, slots, "belady", "oracle", quotas=quotas, name=CLAIRVOYANT)


def all_resident(cold: ReplaySettings, geometry: Geometry) -> ReplaySettings:
    """Make the settings of a device that holds all experts."""
    return replace(cold, slots=geometry.total_experts, policy="all_resident", scope="global", quotas=None)


def with_baselines(
    strategies: Iterable[ReplaySettings], common: ReplaySettings, geometry: Geometry, quotas: Quotas = even_split
) -> list[ReplaySettings]:
    """Add the baselines to strategies, budget by budget.

    The baselines are LRU, Belady, the best static choice in hindsight, and LRU with the window of each strategy that
    verifies drafted tokens together. A device adds clairvoyant prefetching at every budget, and all experts resident
    once.

    Args:
        strategies: Settings of the strategies.
        common: Settings shared by all; baselines start cold.
        geometry: Geometry of the model.
        quotas: Slots of each layer (default: an even split).
    """
    cold = replace(common, warm_start=False)
    by_budget: dict[int, list[ReplaySettings]] = {}
    for settings in strategies:
        by_budget.setdefault(settings.slots, []).append(settings)
    rows = []
    for slots, of_budget in by_budget.items():
        rows += of_budget
        rows += [strategy(cold, slots, policy, quotas=quotas) for policy in (*BASELINES, HINDSIGHT)]
        rows += lru_in_windows(of_budget, cold, slots, quotas)
        if common.device is not None:
            rows.append(
                replace(
                    clairvoyant(cold, slots, quotas),
                    note="prefetches the next demanded experts that are missing; near the optimum, no bound",
                )
            )
    if common.device is not None:
        rows.append(all_resident(cold, geometry))
    return list(dict.fromkeys(rows))
