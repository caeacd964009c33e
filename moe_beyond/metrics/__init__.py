"""Streaming metrics of routing predictions."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports
from moe_beyond.metrics.rows import FIGURES, Figures, LayerMetrics, LookaheadMetrics, ReliabilityBin

if TYPE_CHECKING:
    from moe_beyond.metrics.routing import RoutingMetrics

__all__ = ["FIGURES", "Figures", "LayerMetrics", "LookaheadMetrics", "ReliabilityBin", "RoutingMetrics"]

__getattr__, __dir__ = lazy_exports(__name__, {"RoutingMetrics": "routing"})  # torch takes seconds
