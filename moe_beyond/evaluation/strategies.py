"""Which strategies an evaluation replays: what was asked for, and beside it what every hit rate is compared with."""

from collections.abc import Iterable, Sequence

from moe_beyond.lookahead import Lookahead
from moe_beyond.replay import ReplaySettings

REFERENCES = ("lru", "belady")
"""Policies that stand beside every result, without prefetch: what is easy, and the optimum over whole sequences."""


def strategies(
    slots: Iterable[int],
    *,
    policies: Sequence[str],
    prefetches: Sequence[str] = ("none",),
    lookaheads: Sequence[Lookahead] = (),
    predictor: str | None = None,
    causal: bool = True,
    scope: str = "global",
    warmup_tokens: int = 0,
    first_layer_prefetch: bool = True,
) -> list[ReplaySettings]:
    """List every combination, budget by budget, each followed by the references that it lacks.

    Args:
        slots: Budgets.
        policies: Eviction policies.
        prefetches: Prefetchers; each but ``none`` is replayed at every lookahead.
        lookaheads: Of the predictor's scores.
        predictor: What to call it.
        causal: Whether its scores ignore later tokens.
        scope: ``"global"`` or ``"per-layer"``.
        warmup_tokens: Tokens at a sequence's start that do not count.
        first_layer_prefetch: Whether layers whose scores exist when the token starts are prefetched then.

    Raises:
        UserError: A prefetcher cannot be read, or there are no scores for it.
    """

    def line(budget: int, policy: str, prefetch: str, lookahead: Lookahead | None) -> ReplaySettings:
        return ReplaySettings(
            slots=budget,
            policy=policy,
            scope=scope,
            prefetch=prefetch,
            lookahead=lookahead,
            predictor=None if lookahead is None else predictor,
            causal=lookahead is None or causal,
            warmup_tokens=warmup_tokens,
            first_layer_prefetch=first_layer_prefetch,
        )

    found: list[ReplaySettings] = []
    for budget in dict.fromkeys(slots):
        for policy in policies:
            for prefetch in prefetches:
                ahead: Sequence[Lookahead | None] = [None] if prefetch == "none" or not lookaheads else lookaheads
                found += [line(budget, policy, prefetch, lookahead) for lookahead in ahead]
        found += [line(budget, policy, "none", None) for policy in REFERENCES]
    return list(dict.fromkeys(found))
