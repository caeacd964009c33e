"""How well scores name the experts that a router chose: by lookahead and by layer, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moe_beyond.lookahead import Lookahead

THRESHOLD = 0.5
# Average precision's histogram: half of its bins divide 0..1 evenly, the other half the logits from -16 to 16, so that
# neither flat nor sharp scores fall into a few.
BINS = 2000
LARGEST_LOGIT = 16.0
RELIABILITY_BINS = 15
FIGURES = (
    *("recall_at_k", "f1", "f1_two_class", "accuracy", "f1_micro", "f1_macro", "average_precision", "exact_match"),
    *("nll", "calibration_error", "gate_mass_at_k"),
)
"""Names of the figures of `RoutingMetrics.compute`; the last only where gate weights are known."""
SURE = 1e-7  # a score of 0 or 1 counts as this far from it: a wrong one would cost infinitely much


class RoutingMetrics(Metric):
    """Counts, per (lookahead, layer), what all figures follow from.

    Of the set of the k best-scored experts, as published predictions are sets: recall@k and F1, and MoE-Beyond's two
    (arXiv 2508.17137): per-label accuracy, and the mean of the F1 of the chosen and of the not chosen class. Where gate
    weights are known, gate mass@k, the mean share of a token's gate weights that the set of k has.

    Of the scores cut at 0.5 (a score of 0.5 does not name): micro F1, macro F1 (over a layer's experts; an expert that
    is neither chosen nor named counts 0, so that macro F1 of perfect scores is below 1 where an expert is never used),
    exact match.

    Of the scores as they are: average precision over all of a layer's labels, from a histogram of 2,000 bins, half of
    them even in the score and half in its logit. Scores of one bin count as equal: the figure is up to 0.2 points off,
    mostly low.

    Of the scores as probabilities: negative log-likelihood, in nats a token and layer (the sum over a layer's labels),
    of scores clipped to 1e-7 from 0 and 1, so that a chosen expert scored 0 costs 16 nats; and expected calibration
    error, the mean distance over labels of how probable they were to how many of them came, in 15 equal bins (Guo et
    al. 2017, arXiv 1706.04599). Most labels score near 0 and are right, which makes that error small for any scores:
    naming K / E for every expert has none. ``reliability`` of `to_rows` shows the bins above.

    Args:
        lookaheads: H.
        num_layers: L.
        num_experts: E.
        top_k: Experts that the router chooses, K.
        k: Experts that the prediction may name; K by default.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, lookaheads: int, num_layers: int, num_experts: int, top_k: int, k: int | None = None) -> None:
        super().__init__()
        self.top_k, self.k = top_k, k or top_k
        self.num_experts = num_experts
        by_layer = (lookaheads, num_layers)
        for name, shape in {
            "tokens": (),
            "found": by_layer,
            "exact": by_layer,
            "above": (*by_layer, num_experts),
            "above_chosen": (*by_layer, num_experts),
            "chosen": (*by_layer, num_experts),
            "histogram": (*by_layer, 2, BINS),
        }.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("weighed", torch.zeros(num_layers, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("mass", torch.zeros(by_layer, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("nll", torch.zeros(by_layer, dtype=torch.float64), dist_reduce_fx="sum")
        # By bin: the labels that did not come and those that did; and the sum of scores less the number that came.
        labels = torch.zeros((*by_layer, 2, RELIABILITY_BINS), dtype=torch.int64)
        self.add_state("labels", labels, dist_reduce_fx="sum")
        self.add_state("excess", torch.zeros((*by_layer, RELIABILITY_BINS), dtype=torch.float64), dist_reduce_fx="sum")

    tokens: Tensor
    found: Tensor
    exact: Tensor
    above: Tensor
    above_chosen: Tensor
    chosen: Tensor
    histogram: Tensor
    weighed: Tensor
    mass: Tensor
    nll: Tensor
    labels: Tensor
    excess: Tensor

    def update(self, probabilities: Tensor, targets: Tensor, mask: Tensor, gate_shares: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            probabilities: ``(B, T, H, L, E)`` float.
            targets: ``(B, T, L, E)`` bool.
            mask: ``(B, T)`` bool, true where there is a token.
            gate_shares: ``(B, T, L, E)`` float, shares of a token's gate weights, where they are known; all 0 where a
                token has none.
        """
        scores = probabilities[mask].transpose(0, 1).transpose(1, 2).float()  # (H, L, N, E)
        truth = targets[mask].transpose(0, 1)[None].expand_as(scores)
        # A stable sort breaks ties by the lower expert id, the same on every machine.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        self.tokens += mask.sum()
        self.found += truth.gather(-1, best).sum((-2, -1))
        if gate_shares is not None:
            shares = gate_shares[mask].transpose(0, 1).double()  # (L, N, E)
            self.weighed += (shares.sum(-1) > 0).sum(-1)
            self.mass += shares[None].expand(len(scores), -1, -1, -1).gather(-1, best).sum((-2, -1))
        above = scores > THRESHOLD
        self.exact += (above == truth).all(-1).sum(-1)
        self.above += above.sum(-2)
        self.above_chosen += (above & truth).sum(-2)
        self.chosen += truth.sum(-2)
        steep = scores.logit(eps=1e-8).clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / (2 * LARGEST_LOGIT) + 0.5
        bins = ((scores + steep) / 2 * BINS).long().clamp(0, BINS - 1)
        cell = torch.arange(self.found.numel(), device=bins.device).view(*self.found.shape, 1, 1)
        flat = ((cell * 2 + truth) * BINS + bins).flatten()
        self.histogram += torch.bincount(flat, minlength=self.histogram.numel()).view_as(self.histogram)
        sure = scores.clamp(SURE, 1 - SURE)
        self.nll -= torch.where(truth, sure, 1 - sure).log().sum((-2, -1), dtype=torch.float64)
        bins, excess = (
            (scores * RELIABILITY_BINS).long().clamp(0, RELIABILITY_BINS - 1),
            scores - truth.to(scores.dtype),
        )
        flat = ((cell * 2 + truth) * RELIABILITY_BINS + bins).flatten()
        self.labels += torch.bincount(flat, minlength=self.labels.numel()).view_as(self.labels)
        for number in range(RELIABILITY_BINS):  # a weighted bincount is not deterministic on a GPU
            self.excess[..., number] += torch.where(bins == number, excess, 0.0).sum((-2, -1), dtype=torch.float64)

    def compute(self) -> dict[str, Tensor]:
        """Return each figure as a tensor ``(H, L)`` float64; NaN before any update.

        ``gate_mass_at_k`` is among them where gate weights were given.
        """
        tokens, labels = self.tokens.double(), self.num_experts
        true_positive = self.found.double()
        above, hit, chosen = self.above.double(), self.above_chosen.double(), self.chosen.double()
        named = chosen.sum(-1)  # K a token, but where it has none in a slot
        missed, false_alarm = named - true_positive, tokens * self.k - true_positive
        true_negative = tokens * labels - true_positive - missed - false_alarm
        f1 = _f1(true_positive, missed + false_alarm)
        figures = {
            "recall_at_k": true_positive / named.clamp(min=1),
            "f1": f1,
            "f1_two_class": (f1 + _f1(true_negative, missed + false_alarm)) / 2,
            "accuracy": (true_positive + true_negative) / (tokens * labels),
            "f1_micro": _f1(hit.sum(-1), (above + chosen - 2 * hit).sum(-1)),
            "f1_macro": _f1(hit, above + chosen - 2 * hit).mean(-1),
            "average_precision": _average_precision(self.histogram),
            "exact_match": self.exact.double() / tokens,
            "nll": self.nll / tokens,
            "calibration_error": self.excess.abs().sum(-1) / (tokens * labels),
        }
        if self.weighed.any():
            figures["gate_mass_at_k"] = self.mass / self.weighed.clamp(min=1)
        return {name: values if tokens > 0 else torch.full_like(values, torch.nan) for name, values in figures.items()}

    def to_rows(
        self, lookaheads: Sequence[Lookahead | None], layers: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return one JSON-able object per lookahead: means over layers (micro F1: over all labels).

        Beside them stand ``by_layer``, the figures of each layer; and ``reliability``, the bins of the calibration
        error over all layers' labels: how many labels scored ``from`` to ``to``, how probable they were on average, and
        the share that was chosen (both None where a bin is empty).

        Args:
            lookaheads: H of them.
            layers: Numbers of the MoE layers in their model; 0 to L-1 by default.
        """
        layers = range(self.found.shape[1]) if layers is None else layers
        # torchmetrics makes a scalar of what has one element.
        figures = {name: values.reshape(self.found.shape).tolist() for name, values in self.compute().items()}
        rows = []
        for index, lookahead in enumerate(lookaheads):
            by_layer = [
                {"layer": layer, **{name: values[index][number] for name, values in figures.items()}}
                for number, layer in enumerate(layers)
            ]
            means = {name: sum(values[index]) / len(values[index]) for name, values in figures.items()}
            if self.tokens > 0:  # micro: over all labels alike, whichever their layer
                hit, above, chosen = (x[index].sum().double() for x in (self.above_chosen, self.above, self.chosen))
                means["f1_micro"] = float(_f1(hit, above + chosen - 2 * hit))
            row = {"lookahead": lookahead, "k": self.k, **means, "tokens": int(self.tokens)}
            rows.append({**row, "by_layer": by_layer, "reliability": self._reliability(index)})
        return rows

    def _reliability(self, index: int) -> list[dict[str, Any]]:
        """Return the bins of a lookahead, the least probable first."""
        left_out, came = self.labels[index].sum(0).tolist()
        excess = self.excess[index].sum(0).tolist()
        return [
            {
                "from": number / RELIABILITY_BINS,
                "to": (number + 1) / RELIABILITY_BINS,
                "labels": others + chosen,
                "mean_probability": (chosen + beyond) / (others + chosen) if others + chosen else None,
                "chosen_share": chosen / (others + chosen) if others + chosen else None,
            }
            for number, (others, chosen, beyond) in enumerate(zip(left_out, came, excess, strict=True))
        ]


def _f1(hits: Tensor, errors: Tensor) -> Tensor:
    """F1 from true positives and the sum of false positives and negatives; 0 where there is nothing to find."""
    return torch.where(2 * hits + errors > 0, 2 * hits / (2 * hits + errors).clamp(min=1), 0.0)


def _average_precision(histogram: Tensor) -> Tensor:
    """Sum of precision times the gain in recall, over thresholds from high to low; ``(H, L, 2, bins) -> (H, L)``."""
    negative, positive = histogram.double().flip(-1).unbind(-2)
    found = positive.cumsum(-1)
    precision = found / (found + negative.cumsum(-1)).clamp(min=1)
    return (precision * positive).sum(-1) / found[..., -1].clamp(min=1)
