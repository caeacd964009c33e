"""Figures of a predictor's scores as typed rows: one per lookahead, with one row per layer inside."""

from dataclasses import dataclass, fields
from typing import Any

from moe_beyond.lookahead import Lookahead


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of scores, as `moe_beyond.metrics.RoutingMetrics` defines them; shares are in [0, 1].

    Attributes:
        recall_at_k: Share of the selected experts that are among the k best-scored experts.
        f1: F1 of the set of the k best-scored experts.
        f1_two_class: Mean of the F1 of the selected and of the unselected class.
        accuracy: Share of correct labels, one label per expert.
        f1_micro: F1 of the scores above 0.5, over all labels.
        f1_macro: F1 of the scores above 0.5, as a mean over experts.
        average_precision: Area under the precision-recall curve.
        exact_match: Share of tokens whose scores above 0.5 are exactly the selected experts.
        nll: Negative log-likelihood, in nats per token and layer.
        calibration_error: Expected calibration error.
        gate_mass_at_k: Share of a token's gate weights on the k best-scored experts; None without gate weights.
    """

    recall_at_k: float
    f1: float
    f1_two_class: float
    accuracy: float
    f1_micro: float
    f1_macro: float
    average_precision: float
    exact_match: float
    nll: float
    calibration_error: float
    gate_mass_at_k: float | None = None

    def figures(self) -> dict[str, float]:
        """Return the figures by name, without those that are None."""
        return {name: value for name in FIGURES if (value := getattr(self, name)) is not None}


FIGURES = tuple(field.name for field in fields(Figures))
"""Names of all figures."""


@dataclass(frozen=True, kw_only=True)
class LayerMetrics(Figures):
    """Figures of one lookahead and one layer.

    Attributes:
        layer: Index of the layer in its model.
    """

    layer: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"layer": self.layer, **self.figures()}


@dataclass(frozen=True)
class ReliabilityBin:
    """Labels whose scores are in one interval.

    Attributes:
        low: Lower end of the interval.
        high: Upper end of the interval.
        labels: Number of labels.
        mean_probability: Mean score; None without labels.
        selected_share: Share of the labels whose expert was selected; None without labels.
    """

    low: float
    high: float
    labels: int
    mean_probability: float | None
    selected_share: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "from": self.low,
            "to": self.high,
            "labels": self.labels,
            "mean_probability": self.mean_probability,
            "selected_share": self.selected_share,
        }


@dataclass(frozen=True, kw_only=True)
class LookaheadMetrics(Figures):
    """Figures of one lookahead: means over layers, except micro F1, which is over all labels.

    Attributes:
        lookahead: Lookahead of the scores.
        k: Number of experts that a prediction may name.
        tokens: Number of tokens.
        by_layer: Figures of each layer.
        reliability: Bins of the calibration error over the labels of all layers, in ascending order.
        causal: Whether the scores ignore later tokens (default: True).
        intervals: Ends of 95 % intervals by figure; None without a bootstrap (default: None).
    """

    lookahead: Lookahead | None
    k: int
    tokens: int
    by_layer: tuple[LayerMetrics, ...]
    reliability: tuple[ReliabilityBin, ...]
    causal: bool = True
    intervals: dict[str, list[float]] | None = None

    def summary(self) -> dict[str, Any]:
        """Return plain values, without layers and bins, as a predictor folder records them."""
        intervals = {} if self.intervals is None else {"intervals": self.intervals}
        head = {"lookahead": self.lookahead, "k": self.k, **self.figures(), "tokens": self.tokens}
        return {**head, "causal": self.causal, **intervals}

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        tables = {
            "by_layer": [layer.to_json() for layer in self.by_layer],
            "reliability": [bin.to_json() for bin in self.reliability],
        }
        rest = self.summary()
        head = {name: rest.pop(name) for name in list(rest) if name not in ("causal", "intervals")}
        return {**head, **tables, **rest}
