"""Statistics of trace sets, as `moe-beyond inspect` prints them.

The names below are imported on first use, because numba is.
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.traces.analysis.contrast import check_comparable, contrast_traces, most_different_experts
    from moe_beyond.traces.analysis.counts import RoutingCounts, count_routing
    from moe_beyond.traces.analysis.statistics import normalized_entropy, reuse, summarize
    from moe_beyond.traces.analysis.summary import Contrast, LayerContrast, LayerSummary, TraceSummary

__all__ = [
    "Contrast",
    "LayerContrast",
    "LayerSummary",
    "RoutingCounts",
    "TraceSummary",
    "check_comparable",
    "contrast_traces",
    "count_routing",
    "most_different_experts",
    "normalized_entropy",
    "reuse",
    "summarize",
]

_MODULES = {
    "Contrast": "summary",
    "LayerContrast": "summary",
    "LayerSummary": "summary",
    "RoutingCounts": "counts",
    "TraceSummary": "summary",
    "check_comparable": "contrast",
    "contrast_traces": "contrast",
    "count_routing": "counts",
    "most_different_experts": "contrast",
    "normalized_entropy": "statistics",
    "reuse": "statistics",
    "summarize": "statistics",
}
"""Module of each name."""

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
