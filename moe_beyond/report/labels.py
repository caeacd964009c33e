"""Names of strategies, lookaheads, leaks and metrics, as every table, plot, page and card shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_beyond.lookahead import Lookahead, format_lookahead

if TYPE_CHECKING:
    from moe_beyond.simulator import Result

NO_VALUE = "-"
"""Text of a table cell without a value."""

METRIC_COLUMNS = {
    "recall_at_k": ("recall@k", ".1%"),
    "gate_mass_at_k": ("gate mass@k", ".1%"),
    "f1_micro": ("micro F1", ".1%"),
    "f1_macro": ("macro F1", ".1%"),
    "average_precision": ("avg. precision", ".1%"),
    "exact_match": ("exact", ".1%"),
    "nll": ("NLL", ".2f"),
    "calibration_error": ("cal. error", ".2%"),
    "f1_two_class": ("two-class F1", ".1%"),
    "accuracy": ("accuracy", ".1%"),
}
"""Metric -> column heading and format; ``gate_mass_at_k`` exists only for traces with gate weights."""

BYTES_AXIS = "bytes transferred / demanded"
BYTES_DEFINITION = "bytes = transferred / demanded (1.00: one transfer per access)"
DEMAND_RATIO_DEFINITION = (
    "demand ratio = slots / experts of one token; below 1 the cache cannot hold the experts of one token"
)


@dataclass(frozen=True)
class Baseline:
    """How plots and pages show a baseline.

    Attributes:
        name: Short name at the end of a chart's line.
        legend: Name in a legend.
        css_class: Class of the baseline's line on a page.
        line: Line style of matplotlib.
    """

    name: str
    legend: str
    css_class: str
    line: Mapping[str, Any]


BASELINES: dict[str, Baseline] = {
    "lru": Baseline("LRU", "LRU", "lru", {"color": "black", "linestyle": "-"}),
    "belady": Baseline(
        "Belady", "Belady (optimum without prefetching)", "belady", {"color": "black", "linestyle": "--"}
    ),
    "static_hindsight": Baseline(
        "best static", "best static choice (selected in hindsight)", "static", {"color": "0.55", "linestyle": "-."}
    ),
    "clairvoyant prefetch": Baseline(
        "clairvoyant", "clairvoyant prefetch (knows the future)", "clairvoyant", {"color": "0.55", "linestyle": ":"}
    ),
}
"""Strategy -> how it is shown. Baselines are black or grey; colours are for the strategies compared with them."""


def leaks_of(reads_router_input: bool, causal: bool) -> list[str]:
    """List the information that scores use and no runtime has; empty for scores that exist in time.

    Args:
        reads_router_input: Whether a score has lookahead 0.
        causal: Whether scores ignore later tokens.
    """
    return ["reads the router's input"] * reads_router_input + ["sees later tokens"] * (not causal)


def metric_lookahead(lookahead: Lookahead | None, causal: bool, *, short: bool = False) -> str:
    """Format the lookahead of a row of metrics, such as ``token (LEAK: sees later tokens)``.

    Args:
        lookahead: Lookahead of the row.
        causal: Whether scores ignore later tokens.
        short: Whether ``(LEAK)`` replaces the list of leaks.
    """
    return format_lookahead(lookahead) + _leak_mark(leaks_of(lookahead == 0, causal), short)


def score_lookahead(result: "Result") -> str:
    """Format the lookahead that a strategy's prefetcher reads: ``2``, ``all``, ``all (LEAK)``; ``-`` without scores."""
    if result.predictor is None:
        return NO_VALUE
    return format_lookahead(result.lookahead) + _leak_mark(result_leaks(result), short=True)


def result_leaks(result: "Result") -> list[str]:
    """List the leaks of the scores that a result's strategy read."""
    return leaks_of(result.leaks or result.lookahead == 0, result.causal)


def strategy_label(result: "Result") -> str:
    """Return the legend of a result, such as ``lru + top6, cross_layer, lookahead 1``."""
    if result.predictor is None:
        return _name_in_legend(result.strategy)
    mark = _leak_mark(result_leaks(result), short=True)
    return f"{result.strategy}, {result.predictor}, {_lookahead_phrase(result.lookahead)}{mark}"


def recorded_label(row: Mapping[str, Any]) -> str:
    """Return the legend of a recorded replay, which is a row of ``figures`` in a predictor's configuration."""
    if row["predictor"] is None:
        return _name_in_legend(row["strategy"])
    lookahead = row["lookahead"]
    leaks = leaks_of(row.get("leaks", lookahead == 0), row.get("causal", True))
    return f"{row['strategy']}, {_lookahead_phrase(lookahead)}{_leak_mark(leaks, short=False)}"


def _name_in_legend(strategy: str) -> str:
    return BASELINES[strategy].legend if strategy in BASELINES else strategy


def _lookahead_phrase(lookahead: Lookahead | None) -> str:
    return "all lookaheads" if lookahead is None else f"lookahead {format_lookahead(lookahead)}"


def _leak_mark(leaks: list[str], short: bool) -> str:
    if not leaks:
        return ""
    return " (LEAK)" if short else f" (LEAK: {', '.join(leaks)})"
