"""naive_bayes: token id, earlier layers and each expert's past, combined as if they were independent.

It is fitted by counting, in one pass and without gradients, and serves as a baseline for neural predictors.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.architectures.history import History
from moe_beyond.predictors.architectures.token_table import TokenTable
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import CountingPredictor, in_range
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.training_stats import TrainingStats


class NaiveBayes(CountingPredictor):
    """Adds weighted log-odds of each source relative to the popularity.

    P(e) is the popularity of e in layer l. The logit of lookahead h is the sum of

    - ``logit P(e)``,
    - ``token * (logit P(e | token) - logit P(e))``,
    - ``history * (logit P(e | its past) - logit P(e))``, and
    - ``layers * log(P(e | f) / P(e))`` for every expert f of the layers l - d, d = h .. h + sources - 1.

    Here ``P(e | f) = (tokens that used both + smoothing * P(e)) / (tokens that used f + smoothing)``. The sources are
    not independent, so their weights are below 1.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        lookaheads: Number of lookaheads, H (default: 3).
        sources: Number of routed layers that are read, from the last one backwards (default: 3).
        token: Weight of the token id (default: 0.6).
        history: Weight of the expert's past in the sequence (default: 0.9).
        layers: Weight of each expert of the layers that are read (default: 0.2).
        backoff: Weight of the popularity for a token id, in occurrences of the token (default: 2).
        min_count: Minimum training occurrences of a token with its own counts (default: 1).
        smoothing: Weight of the popularity for an expert pair, in occurrences of the expert (default: 8).
    """

    architecture: ClassVar[str] = "naive_bayes"
    activation: Activation = "sigmoid"

    pairs: Tensor

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        lookaheads: int = 3,
        sources: int = 3,
        token: float = 0.6,
        history: float = 0.9,
        layers: float = 0.2,
        backoff: float = 2.0,
        min_count: int = 1,
        smoothing: float = 8.0,
    ) -> None:
        super().__init__(geometry, vocab_size)
        check_arguments(self.architecture, locals())
        self.lookaheads, self.sources, self.smoothing = lookaheads, sources, smoothing
        self.token, self.history, self.layers = token, history, layers
        self.backoff, self.min_count = backoff, min_count
        self.table = TokenTable(geometry, vocab_size, backoff, min_count)
        self.past = History(geometry, vocab_size)
        experts = geometry.num_experts
        # [d - 1, l, f, e]: number of tokens that used f in layer l - d and e in layer l.
        shape = (lookaheads + sources - 1, geometry.num_layers, experts, experts)
        self.register_buffer("pairs", torch.zeros(shape, dtype=torch.int32))

    @property
    def information(self) -> InformationSet:
        """Causal; lookaheads 1 .. H, available when a layer is routed."""
        return InformationSet(tuple(range(1, self.lookaheads + 1)), token_ids=self.token != 0)

    def prepare(self, stats: TrainingStats) -> None:
        """Read the training split's vocabulary."""
        self.table.prepare(stats)

    def partial_fit(self, batch: Batch) -> None:
        """Add a batch to the counts."""
        self.table.partial_fit(batch)
        self.past.partial_fit(batch)
        used = batch.targets(self.geometry.num_experts)[batch.mask].float().transpose(0, 1)  # (L, N, E)
        for d, pairs in self._distances(self.pairs):
            pairs[d:] += torch.bmm(used[:-d].transpose(1, 2), used[d:]).to(pairs.dtype)

    def _distances(self, by_distance: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each distance that occurs in the model, and its slice."""
        return ((d, part) for d, part in enumerate(by_distance, 1) if d < self.geometry.num_layers)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``."""
        base = self._base(self.table(batch)[:, :, 0], self.past(batch)[:, :, 0])
        used = batch.targets(self.geometry.num_experts).float().transpose(0, 2).flatten(1, 2)  # (L, T * B, E)
        logits = base.transpose(0, 2).flatten(1, 2)[None].repeat(self.lookaheads, 1, 1, 1)  # (H, L, T * B, E)
        for d, ratios in self._distances(self._ratios()):
            evidence = torch.bmm(used[:-d], ratios[d:])
            for ahead in self._lookaheads_at(d):
                logits[ahead - 1, d:] += evidence
        shape = (self.lookaheads, self.geometry.num_layers, *batch.token_ids.shape[::-1], self.geometry.num_experts)
        return logits.view(shape).permute(3, 2, 0, 1, 4)

    def _base(self, table: Tensor, past: Tensor) -> Tensor:
        """Return the logits ``(..., L, E)`` that are available when a token starts.

        Args:
            table: Logits ``(..., L, E)`` given the token id.
            past: Logits ``(..., L, E)`` given the experts' past.
        """
        popular = self.past._logits()  # noqa: SLF001
        return popular + self.token * (table - popular) + self.history * (past - popular)

    def _ratios(self) -> Tensor:
        """Return the weighted log-ratios ``(D, L, E, E)`` that each routed expert adds."""
        popular = self.past._shares().float()  # noqa: SLF001
        counts = self.past.counts.float()
        ratios = torch.zeros(self.pairs.shape, device=counts.device)
        for d, pairs in self._distances(self.pairs):
            prior = self.smoothing * popular[d:, None]
            share = (pairs[d:] + prior) / (counts[:-d, :, None] + self.smoothing)
            ratios[d - 1, d:] = self.layers * (share / popular[d:, None]).log()
        return ratios

    def _lookaheads_at(self, distance: int) -> range:
        """Return the lookaheads that read the layer at a distance."""
        return range(max(1, distance - self.sources + 1), min(distance, self.lookaheads) + 1)

    def weights_fault(self) -> str | None:
        """Describe counts of pairs that are negative; the table and the past describe their own."""
        return None if in_range(self.pairs, 0) else "pairs are negative"

    def stepper(self) -> Stepper:
        """Return a stepper; its state is two numbers per expert."""
        return _NaiveBayesStepper(self)


class _NaiveBayesStepper(Stepper):
    _predictor: NaiveBayes

    def __init__(self, predictor: NaiveBayes) -> None:
        self._ratios = predictor._ratios()  # noqa: SLF001
        self._past = predictor.past.stepper()
        super().__init__(predictor)

    def _reset(self) -> None:
        self._past.reset()
        self._scores = np.full(self._predictor.geometry.shape()[:2], np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        table, past = self._predictor.table.token_logits(torch.tensor(token_id)), self._past.logits()
        base = self._predictor._base(table, past)  # noqa: SLF001
        self._logits = base[None].repeat(self._predictor.lookaheads, 1, 1)
        self._score(-1)

    @torch.inference_mode()
    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        ids = torch.from_numpy(experts)
        self._past.add(layer, ids)
        for d in range(1, len(self._ratios) + 1):
            if layer + d < len(self._scores):
                evidence = self._ratios[d - 1, layer + d, ids].sum(0)
                for ahead in self._predictor._lookaheads_at(d):  # noqa: SLF001
                    self._logits[ahead - 1, layer + d] += evidence
        self._score(layer)

    def scores(self) -> npt.NDArray[np.float32]:
        return self._scores

    def _score(self, routed: int) -> None:
        """Score the layers within reach; ``routed`` is the last routed layer, or -1."""
        self._scores = np.full_like(self._scores, np.nan)
        ahead = np.arange(min(self._predictor.lookaheads, len(self._scores) - routed - 1))
        if len(ahead):
            targets = ahead + routed + 1
            logits = self._logits.numpy()[ahead, targets]
            self._scores[targets] = self._predictor.step_probabilities(logits, ahead, targets)
