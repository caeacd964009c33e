"""Agreement of scores with the experts that a router selected, by lookahead and layer, in one pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from moe_beyond.lookahead import Lookahead
from moe_beyond.metrics.exact import ONE, check_finite, fixed
from moe_beyond.metrics.rows import LayerMetrics, LookaheadMetrics, ReliabilityBin

THRESHOLD = 0.5
BINS = 2000
"""Bins of average precision: half divide scores evenly, half logits, for resolution of both flat and sharp scores."""
LARGEST_LOGIT = 16.0
RELIABILITY_BINS = 15
VALUES_AT_ONCE = 2**20
"""Scores that are added at once. A dozen temporary tensors of a whole batch would be larger than the processor's cache,
and would fragment the memory."""
CLIP = 1e-7
"""Distance of clipped scores from 0 and 1: an unclipped wrong score would cost infinitely much."""


class RoutingMetrics(Metric):
    """Counts per (lookahead, layer) from which all figures follow.

    The set of the k best-scored experts yields recall@k, F1, and MoE-Beyond's two figures (arXiv 2508.17137): per-label
    accuracy, and the mean of the F1 of the selected and of the unselected class. With gate weights it also yields gate
    mass@k: the mean share of a token's gate weights on that set.

    Scores above 0.5 yield micro F1, macro F1 and exact match. Macro F1 is a mean over a layer's experts. An expert that
    is neither selected nor predicted counts as 0, so perfect scores stay below 1 if an expert is never used.

    Average precision is over all labels of a layer. It is computed from a histogram of 2,000 bins: half of them divide
    the score evenly, the other half its logit. Scores in one bin count as equal, so the figure is up to 0.2 points off,
    mostly low.

    Negative log-likelihood (NLL) is in nats per token and layer, summed over a layer's labels. Scores are clipped to
    1e-7 from 0 and 1, so a selected expert with score 0 costs 16 nats.

    Expected calibration error is the mean distance over labels between mean score and observed share in 15 equal bins
    (Guo et al. 2017, arXiv 1706.04599). Most labels have a score near 0 and are right, which makes the error small for
    any scores: a constant score of K / E has none. `LookaheadMetrics.reliability` holds the bins.

    Args:
        lookaheads: Number of lookaheads H.
        num_layers: Number of MoE layers L.
        num_experts: Number of experts per layer E.
        top_k: Number of experts K that the router selects per token.
        k: Number of experts that the prediction may name (default: K).

    Example:
        >>> import torch
        >>> metrics = RoutingMetrics(lookaheads=1, num_layers=1, num_experts=4, top_k=2)
        >>> scores = torch.tensor([0.9, 0.8, 0.1, 0.2]).view(1, 1, 1, 1, 4)
        >>> metrics.update(scores, torch.tensor([True, False, True, False]).view(1, 1, 1, 4), torch.ones(1, 1).bool())
        >>> [row] = metrics.rows(["token"])
        >>> row.recall_at_k, row.tokens
        (0.5, 1)
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
            "true_positives": by_layer,
            "exact": by_layer,
            "above": (*by_layer, num_experts),
            "above_selected": (*by_layer, num_experts),
            "selected": (*by_layer, num_experts),
            "histogram": (*by_layer, 2, BINS),
        }.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("weighted_tokens", torch.zeros(num_layers, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("mass", "nll"):
            self.add_state(name, torch.zeros(by_layer, dtype=torch.int64), dist_reduce_fx="sum")
        # By bin: numbers of unselected and of selected labels; sum of scores minus the number of selected labels.
        labels = torch.zeros((*by_layer, 2, RELIABILITY_BINS), dtype=torch.int64)
        self.add_state("labels", labels, dist_reduce_fx="sum")
        self.add_state("excess", torch.zeros((*by_layer, RELIABILITY_BINS), dtype=torch.int64), dist_reduce_fx="sum")

    tokens: Tensor
    true_positives: Tensor
    exact: Tensor
    above: Tensor
    above_selected: Tensor
    selected: Tensor
    histogram: Tensor
    weighted_tokens: Tensor
    mass: Tensor
    nll: Tensor
    labels: Tensor
    excess: Tensor

    def update(self, probabilities: Tensor, targets: Tensor, mask: Tensor, gate_shares: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            probabilities: ``(B, T, H, L, E)`` float.
            targets: ``(B, T, L, E)`` bool.
            mask: ``(B, T)`` bool, true at tokens and false at padding.
            gate_shares: ``(B, T, L, E)`` float, shares of a token's gate weights, all 0 at tokens without gate weights
                (default: None, not recorded).
        """
        scores, truth = probabilities[mask], targets[mask]
        shares = None if gate_shares is None else gate_shares[mask]
        at_once = max(1, VALUES_AT_ONCE // math.prod(scores.shape[1:]))
        for begin in range(0, len(scores), at_once):
            part = slice(begin, begin + at_once)
            self._add(scores[part], truth[part], None if shares is None else shares[part])

    def _add(self, probabilities: Tensor, targets: Tensor, gate_shares: Tensor | None) -> None:
        """Add N tokens.

        Args:
            probabilities: ``(N, H, L, E)`` float.
            targets: ``(N, L, E)`` bool.
            gate_shares: ``(N, L, E)`` float; None if not recorded.
        """
        scores = probabilities.transpose(0, 1).transpose(1, 2).float()  # (H, L, N, E)
        check_finite(scores)
        truth = targets.transpose(0, 1)[None].expand_as(scores)
        # A stable sort breaks ties by the lower expert id on every machine.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        self.tokens += len(probabilities)
        self.true_positives += truth.gather(-1, best).sum((-2, -1))
        if gate_shares is not None:
            shares = gate_shares.transpose(0, 1).double()  # (L, N, E)
            self.weighted_tokens += (shares.sum(-1) > 0).sum(-1)
            self.mass += fixed(shares[None].expand(len(scores), -1, -1, -1).gather(-1, best)).sum((-2, -1))
        above = scores > THRESHOLD
        self.exact += (above == truth).all(-1).sum(-1)
        self.above += above.sum(-2)
        self.above_selected += (above & truth).sum(-2)
        self.selected += truth.sum(-2)
        stretched = scores.logit(eps=1e-8).clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / (2 * LARGEST_LOGIT) + 0.5
        bins = ((scores + stretched) / 2 * BINS).long().clamp(0, BINS - 1)
        cell = torch.arange(self.true_positives.numel(), device=bins.device).view(*self.true_positives.shape, 1, 1)
        flat = ((cell * 2 + truth) * BINS + bins).flatten()
        self.histogram += torch.bincount(flat, minlength=self.histogram.numel()).view_as(self.histogram)
        clipped = scores.clamp(CLIP, 1 - CLIP)
        self.nll -= fixed(torch.where(truth, clipped, 1 - clipped).log()).sum((-2, -1))
        bins = (scores * RELIABILITY_BINS).long().clamp(0, RELIABILITY_BINS - 1)
        excess = scores - truth.to(scores.dtype)
        flat = ((cell * 2 + truth) * RELIABILITY_BINS + bins).flatten()
        self.labels += torch.bincount(flat, minlength=self.labels.numel()).view_as(self.labels)
        bins = (cell * RELIABILITY_BINS + bins).flatten()
        self.excess.view(-1).index_add_(0, bins, fixed(excess).flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return each figure as a tensor ``(H, L)`` float64; NaN before any update.

        ``gate_mass_at_k`` is present if gate weights were given.
        """
        return self._figures()

    def _figures(self) -> dict[str, Tensor]:
        tokens, labels = self.tokens.double(), self.num_experts
        true_positive = self.true_positives.double()
        above, hit, selected = self.above.double(), self.above_selected.double(), self.selected.double()
        named = selected.sum(-1)  # K per token, less its padding
        missed, false_alarm = named - true_positive, tokens * self.k - true_positive
        true_negative = tokens * labels - true_positive - missed - false_alarm
        f1 = _f1(true_positive, missed + false_alarm)
        figures = {
            "recall_at_k": true_positive / named.clamp(min=1),
            "f1": f1,
            "f1_two_class": (f1 + _f1(true_negative, missed + false_alarm)) / 2,
            "accuracy": (true_positive + true_negative) / (tokens * labels),
            "f1_micro": _f1(hit.sum(-1), (above + selected - 2 * hit).sum(-1)),
            "f1_macro": _f1(hit, above + selected - 2 * hit).mean(-1),
            "average_precision": _average_precision(self.histogram),
            "exact_match": self.exact.double() / tokens,
            "nll": self.nll.double() / (tokens * ONE),
            "calibration_error": self.excess.abs().sum(-1).double() / (tokens * labels * ONE),
        }
        if self.weighted_tokens.any():
            figures["gate_mass_at_k"] = self.mass.double() / (self.weighted_tokens.clamp(min=1) * ONE)
        return {name: values if tokens > 0 else torch.full_like(values, torch.nan) for name, values in figures.items()}

    def rows(
        self,
        lookaheads: Sequence[Lookahead | None],
        layers: Sequence[int] | None = None,
        *,
        causal: bool = True,
        over_ranks: bool = False,
    ) -> list[LookaheadMetrics]:
        """Return the figures of each lookahead: means over layers, except micro F1, which is over all labels.

        Args:
            lookaheads: The H lookaheads.
            layers: Indices of the MoE layers in their model (default: 0 to L - 1).
            causal: Whether the scores ignore later tokens (default: True).
            over_ranks: Whether to add the counts of all ranks, which all must call this (default: False).
        """
        with self.sync_context(should_sync=over_ranks, should_unsync=over_ranks):
            return self._rows(lookaheads, layers, causal=causal)

    def _rows(
        self, lookaheads: Sequence[Lookahead | None], layers: Sequence[int] | None, *, causal: bool
    ) -> list[LookaheadMetrics]:
        layers = range(self.true_positives.shape[1]) if layers is None else layers
        figures = {name: values.tolist() for name, values in self._figures().items()}
        rows = []
        for index, lookahead in enumerate(lookaheads):
            means = {name: sum(values[index]) / len(values[index]) for name, values in figures.items()}
            if self.tokens > 0:
                hits, above, selected = (
                    x[index].sum().double() for x in (self.above_selected, self.above, self.selected)
                )
                means["f1_micro"] = float(_f1(hits, above + selected - 2 * hits))
            row = LookaheadMetrics(
                lookahead=lookahead,
                k=self.k,
                tokens=int(self.tokens),
                by_layer=tuple(
                    LayerMetrics(layer=layer, **{name: values[index][number] for name, values in figures.items()})
                    for number, layer in enumerate(layers)
                ),
                reliability=self._reliability(index),
                causal=causal,
                **means,
            )
            rows.append(row)
        return rows

    def _reliability(self, index: int) -> tuple[ReliabilityBin, ...]:
        """Return the bins of a lookahead in ascending order."""
        unselected, selected = self.labels[index].sum(0).tolist()
        excess = (self.excess[index].sum(0).double() / ONE).tolist()
        labels = list(zip(unselected, selected, excess, strict=True))
        return tuple(
            ReliabilityBin(
                low=number / RELIABILITY_BINS,
                high=(number + 1) / RELIABILITY_BINS,
                labels=negatives + positives,
                mean_probability=(positives + excess) / (negatives + positives) if negatives + positives else None,
                selected_share=positives / (negatives + positives) if negatives + positives else None,
            )
            for number, (negatives, positives, excess) in enumerate(labels)
        )


def _f1(hits: Tensor, errors: Tensor) -> Tensor:
    """F1 from true positives and the sum of false positives and negatives; 0 if all are 0."""
    return torch.where(2 * hits + errors > 0, 2 * hits / (2 * hits + errors).clamp(min=1), 0.0)


def _average_precision(histogram: Tensor) -> Tensor:
    """Sum of precision times the gain in recall, over thresholds from high to low; ``(H, L, 2, bins) -> (H, L)``."""
    negative, positive = histogram.double().flip(-1).unbind(-2)
    true_positives = positive.cumsum(-1)
    precision = true_positives / (true_positives + negative.cumsum(-1)).clamp(min=1)
    return (precision * positive).sum(-1) / true_positives[..., -1].clamp(min=1)
