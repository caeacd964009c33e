"""Metrics of one source's scores; imports torch, so the engine imports it only to measure."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.evaluation.bootstrap import RecallSums, recall_intervals
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.geometry import Geometry
from moe_beyond.metrics import LookaheadMetrics, RoutingMetrics
from moe_beyond.predictors.batch import collate
from moe_beyond.traces.trace import Trace


class Measurement:
    """Metrics of a source's scores, sequence by sequence.

    Args:
        source: Source of the scores.
        geometry: Geometry of the model.
        bootstrap_draws: Number of bootstrap draws for intervals of recall; 0 for none.
    """

    def __init__(self, source: ScoreSource, geometry: Geometry, bootstrap_draws: int) -> None:
        self.source = source
        self._layers = geometry.moe_layers
        self.metrics = RoutingMetrics(len(source.lookaheads), *geometry.shape())
        self.recall = RecallSums()
        self._bootstrap_draws = bootstrap_draws

    def add(self, trace: Trace, scores: npt.NDArray[np.float32]) -> None:
        """Add a sequence.

        Args:
            trace: Trace of the sequence.
            scores: ``(T, H, L, E)`` float32.
        """
        metrics, recall = self.metrics, self.recall
        batch, experts = collate([trace]), scores.shape[-1]
        recalled, selected = metrics.true_positives.clone(), metrics.selected.sum(-1)
        metrics.update(torch.from_numpy(scores)[None], batch.targets(experts), batch.mask, batch.gate_shares(experts))
        if self._bootstrap_draws:
            recall.names.append(trace.sequence_id)
            recall.recalled.append((metrics.true_positives - recalled).double().numpy())
            recall.selected.append((metrics.selected.sum(-1) - selected).double().numpy())

    def absorb(self, later: "Measurement") -> None:
        """Add the measurement of later sequences by the same source."""
        self.metrics.merge_state(later.metrics)
        for name, rows in vars(later.recall).items():
            getattr(self.recall, name).extend(rows)

    def rows(self) -> list[LookaheadMetrics]:
        """Return one row per lookahead, with intervals if there are draws."""
        rows = self.metrics.rows(self.source.lookaheads, self._layers, causal=self.source.causal)
        if self._bootstrap_draws:
            intervals = recall_intervals(self.recall, self._bootstrap_draws)
            rows = [replace(row, intervals={"recall_at_k": ends}) for row, ends in zip(rows, intervals, strict=True)]
        return rows
