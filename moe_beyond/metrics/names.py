"""Names under which a fit logs its figures; wandb makes a section of the part before the slash.

Each number has one name. ``val/recall_at_k`` is that of the predictor's first lookahead, whichever that is, so that one
configuration can monitor it for every predictor; the other figures of that lookahead are in its section.
"""

import re
from collections.abc import Sequence

from moe_beyond.lookahead import Lookahead
from moe_beyond.metrics.rows import LookaheadMetrics

HEADLINE = "recall_at_k"
EQUAL = ("f1",)
"""Figures of `RoutingMetrics` that are not logged: where a router fills its K slots, F1 of the best K is recall@k."""


def of_lookahead(stage: str, lookahead: Lookahead | str | None, figure: str, *, first: bool = False) -> str:
    """Name a figure of one lookahead.

    Args:
        stage: ``val`` or ``test``.
        lookahead: When the scores were known.
        figure: A figure of `RoutingMetrics`.
        first: Whether it is the predictor's first lookahead.
    """
    return f"{stage}/{figure}" if first and figure == HEADLINE else f"{stage}_lookahead_{lookahead}/{figure}"


def of_budget(stage: str, budget: str, figure: str) -> str:
    """Name a figure of a replay, with letters, digits and underscores only, as wandb's queries want them.

    Example:
        >>> of_budget("val", "10%", "hit_rate"), of_budget("val", "2.9GB", "lru_hit_rate"), of_budget("val", "24", "x")
        ('val_budget_10pct/hit_rate', 'val_budget_2_9GB/lru_hit_rate', 'val_budget_24_slots/x')
    """
    text = "".join(str(budget).split())
    text = f"{text}_slots" if text.isdigit() else re.sub(r"\W", "_", text.replace("%", "pct"))
    return f"{stage}_budget_{text}/{figure}"


def lookahead_figures(rows: Sequence[LookaheadMetrics], stage: str) -> dict[str, float]:
    """Return the figures to log, by name."""
    return {
        of_lookahead(stage, row.lookahead, figure, first=number == 0): value
        for number, row in enumerate(rows)
        for figure, value in row.figures().items()
        if figure not in EQUAL
    }
