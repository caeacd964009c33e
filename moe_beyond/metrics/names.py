"""Names of the figures that a fit logs; wandb shows one section per part before the slash.

Each figure has one name. ``val/recall_at_k`` is the recall of the predictor's first lookahead, so that one
configuration can monitor every predictor. All other figures are in the section of their lookahead.
"""

import re
from collections.abc import Sequence

from moe_beyond.lookahead import Lookahead
from moe_beyond.metrics.rows import LookaheadMetrics

HEADLINE = "recall_at_k"
UNLOGGED = ("f1",)
"""Figures that are not logged: without padding experts, F1 of the K best-scored experts equals recall@k."""


def of_lookahead(stage: str, lookahead: Lookahead | str | None, figure: str, *, first: bool = False) -> str:
    """Return the name of a figure of one lookahead.

    Args:
        stage: ``val`` or ``test``.
        lookahead: Lookahead of the scores.
        figure: Name of a figure of `RoutingMetrics`.
        first: Whether this is the predictor's first lookahead (default: False).
    """
    return f"{stage}/{figure}" if first and figure == HEADLINE else f"{stage}_lookahead_{lookahead}/{figure}"


def of_budget(stage: str, budget: str, figure: str) -> str:
    """Return the name of a figure of a replay, of letters, digits and underscores, which wandb's queries accept.

    Args:
        stage: ``val`` or ``test``.
        budget: Budget of the replay.
        figure: Name of the figure.

    Example:
        >>> of_budget("val", "10%", "hit_rate"), of_budget("val", "2.9GB", "lru_hit_rate"), of_budget("val", "24", "x")
        ('val_budget_10pct/hit_rate', 'val_budget_2_9GB/lru_hit_rate', 'val_budget_24_slots/x')
    """
    text = "".join(str(budget).split())
    text = f"{text}_slots" if text.isdigit() else re.sub(r"\W", "_", text.replace("%", "pct"))
    return f"{stage}_budget_{text}/{figure}"


def lookahead_figures(rows: Sequence[LookaheadMetrics], stage: str) -> dict[str, float]:
    """Return the figures to log, by name.

    Args:
        rows: One row per lookahead, the predictor's first lookahead first.
        stage: ``val`` or ``test``.
    """
    return {
        of_lookahead(stage, row.lookahead, figure, first=number == 0): value
        for number, row in enumerate(rows)
        for figure, value in row.figures().items()
        if figure not in UNLOGGED
    }
