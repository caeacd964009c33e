"""Which strategies an evaluation replays: what was asked for, and beside it what every result is compared with."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.settings import reads_scores

REFERENCES = ("lru", "belady")
"""Policies that stand next to every result, without prefetch: what is easy, and the optimum over whole sequences of all
that must take in what is demanded."""

CLAIRVOYANT = "clairvoyant prefetch"

Quotas = Callable[[int], tuple[int, ...] | None]
"""Slots of each layer, of so many in all; None splits them evenly."""


def evenly(slots: int) -> None:
    """Split slots evenly."""


def strategy(
    common: ReplaySettings,
    slots: int,
    policy: str,
    prefetch: str = "none",
    source: ScoreSource | None = None,
    lookahead: Lookahead | None = None,
    quotas: Quotas = evenly,
    name: str | None = None,
) -> ReplaySettings:
    """Put a strategy together.

    Args:
        common: What it shares with others.
        slots: The budget.
        policy: Eviction policy.
        prefetch: Prefetcher.
        source: Of scores, if there is one; used by policies and prefetchers that read any.
        lookahead: Which of them top<m> and p><t> ask by; the source's first by default.
        quotas: Slots of each layer.
        name: Of the strategy, where it has one.

    Raises:
        UserError: The prefetcher cannot be read, or two settings do not go together.
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
            "available": source.available,
            "predictor": source.name,
            "causal": source.causal,
        }
    return replace(common, slots=slots, policy=policy, quotas=quotas(slots), prefetch=prefetch, name=name, **scores)


def combinations(
    common: ReplaySettings,
    slots: Iterable[int],
    policies: Sequence[str],
    prefetches: Sequence[str] = ("none",),
    source: ScoreSource | None = None,
    lookaheads: Sequence[Lookahead] = (),
    quotas: Quotas = evenly,
) -> list[ReplaySettings]:
    """List every combination of budgets, policies and prefetchers; those that ask by one lookahead at each given one.

    Raises:
        UserError: A prefetcher cannot be read, or there are no scores for it.
    """
    found = []
    for budget in dict.fromkeys(slots):
        for policy in policies:
            for prefetch in prefetches:
                by_one = parse_prefetch(prefetch).prefetcher.reads_one_lookahead and source is not None
                for lookahead in (lookaheads or (None,)) if by_one else (None,):
                    found.append(strategy(common, budget, policy, prefetch, source, lookahead, quotas))
    return list(dict.fromkeys(found))


def in_windows(
    strategies: Iterable[ReplaySettings], cold: ReplaySettings, slots: int, quotas: Quotas = evenly
) -> list[ReplaySettings]:
    """Return LRU in the windows of each strategy whose windows are wider than those that all have.

    A window loads an expert once for all its tokens, whatever the policy, so LRU token by token says nothing of it.
    """
    windows = dict.fromkeys(settings.window for settings in strategies if settings.window > cold.window)
    return [
        strategy(replace(cold, window=window), slots, "lru", quotas=quotas, name=f"lru, window {window}")
        for window in windows
    ]


def beside(
    asked: Iterable[ReplaySettings], common: ReplaySettings, geometry: Geometry, quotas: Quotas = evenly
) -> list[ReplaySettings]:
    """Set the references next to strategies, budget by budget.

    LRU, Belady, and the best fixed choice in hindsight; LRU in the same windows as a strategy that verifies drafted
    tokens together; on a device also clairvoyant prefetch over the same link, and, once, all experts resident.
    """
    cold = replace(common, warm_start=False)
    by_budget: dict[int, list[ReplaySettings]] = {}
    for settings in asked:
        by_budget.setdefault(settings.slots, []).append(settings)
    found = []
    for slots, lines in by_budget.items():
        references = [strategy(cold, slots, policy, quotas=quotas) for policy in (*REFERENCES, "static_hindsight")]
        references += in_windows(lines, cold, slots, quotas)
        if common.device is not None:
            clairvoyant = strategy(cold, slots, "belady", "oracle", quotas=quotas, name=CLAIRVOYANT)
            references.append(replace(clairvoyant, note="brings in what is missing next; near the optimum, no bound"))
        found += [*lines, *references]
    if common.device is not None:
        found.append(replace(cold, slots=geometry.total_experts, policy="all_resident", scope="global", quotas=None))
    return list(dict.fromkeys(found))
