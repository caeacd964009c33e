"""Streaming metrics of routing predictions."""

from typing import TYPE_CHECKING, Any

from moe_beyond.metrics.rows import FIGURES, Figures, LayerMetrics, LookaheadMetrics, ReliabilityBin

if TYPE_CHECKING:
    from moe_beyond.metrics.routing import RoutingMetrics

__all__ = ["FIGURES", "Figures", "LayerMetrics", "LookaheadMetrics", "ReliabilityBin", "RoutingMetrics"]


def __getattr__(name: str) -> Any:
    """Import `RoutingMetrics` when it is first used: torch takes seconds."""
    if name == "RoutingMetrics":
        from moe_beyond.metrics.routing import RoutingMetrics

        return RoutingMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
