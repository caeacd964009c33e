"""Streaming metrics of routing predictions."""

from moe_beyond.metrics.routing import RoutingMetrics

__all__ = ["RoutingMetrics"]
