"""history: an expert's next use, predicted from its past in the sequence and its popularity in training."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.base import in_range
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import TokenStepper
from moe_beyond.usage_profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES, UsageProfile

AGES, RATES = len(AGE_EDGES) + 1, len(RATE_EDGES) + 1


class History(Popularity):
    """Looks up an expert's age and rate (`moe_beyond.usage_profile`) in one table for all layers and experts.

    P = (uses + 2 K/E) / (trials + 2) in the bucket of age and rate. Trials count how often an expert of any layer was
    in the bucket; uses count how often the next token then used it. Two imaginary tokens used all experts evenly.

    A batch is counted with the popularity so far, including the batch. The order of batches therefore matters slightly,
    mostly for buckets that few experts reach.

    Every row starts without a past, also a later segment of a long sequence: fit with ``data.max_tokens`` above the
    longest sequence.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
    """

    architecture: ClassVar[str] = "history"

    uses: Tensor
    trials: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__(geometry, vocab_size)
        self.register_buffer("uses", torch.zeros(AGES, RATES, dtype=torch.int64))
        self.register_buffer("trials", torch.zeros(AGES, RATES, dtype=torch.int64))

    @property
    def information(self) -> InformationSet:
        """Experts of earlier tokens."""
        return InformationSet(("token",), token_ids=False)

    def partial_fit(self, batch: Batch) -> None:
        """Add a batch to the counts."""
        super().partial_fit(batch)
        used = batch.targets(self.geometry.num_experts)
        counts = self.trials.new_zeros(2 * AGES * RATES)
        for token, (bucket, used_now) in enumerate(zip(self._buckets(used), used.unbind(1), strict=True)):
            outcome = bucket.add_(used_now, alpha=AGES * RATES)
            counts += torch.bincount(outcome[batch.lengths > token].flatten(), minlength=len(counts))
        unused, uses = counts.view(2, AGES, RATES)
        self.uses += uses
        self.trials += unused + uses

    def profile(self) -> UsageProfile:
        """Return the usage profile: the popularity and the table."""
        return UsageProfile(self._shares().cpu().numpy(), self._hazard().cpu().numpy())

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``."""
        used, table = batch.targets(self.geometry.num_experts), self._table()
        logits = table.new_empty(used.shape)
        for token, bucket in enumerate(self._buckets(used)):
            logits[:, token] = table[bucket]
        return logits[:, :, None]

    def _buckets(self, used: Tensor) -> Iterator[Tensor]:
        """Yield the experts' buckets ``(B, L, E)`` before each token.

        Args:
            used: Whether a token used an expert, ``(B, T, L, E)`` bool.
        """
        past = _Past(used[:, 0].shape, self._shares())
        for used_now in used.unbind(1):
            yield past.buckets()
            past.add(used_now)

    def _hazard(self) -> Tensor:
        _, experts, top_k = self.geometry.shape()
        return (self.uses.double() + 2 * top_k / experts) / (self.trials + 2)

    def _table(self) -> Tensor:
        """Return the logits ``(64,)`` of the buckets."""
        return torch.logit(self._hazard(), eps=1e-9).float().flatten()

    def weights_fault(self) -> str | None:
        """Describe counts that are negative, or uses that exceed their trials."""
        if not (in_range(self.uses, 0, self.trials) and in_range(self.trials, 0)):
            return "uses are not in 0..trials"
        return super().weights_fault()

    def stepper(self) -> "HistoryStepper":
        """Return a stepper; its state is two numbers per expert."""
        return HistoryStepper(self)


class _Past:
    """Age and rate of experts, in double precision because rounded rates may fall into different buckets.

    Args:
        shape: Shape ``(..., E)`` of the experts.
        popularity: Popularity of each expert, broadcast to the shape.
    """

    def __init__(self, shape: Sequence[int], popularity: Tensor) -> None:
        self._prior = PRIOR * popularity
        self._count = popularity.new_zeros(shape)
        self._weight = popularity.new_zeros(())
        self._age = torch.full_like(self._count, -torch.inf)  # below every edge, like 0; adding 1 does not change it
        self._age_edges, self._rate_edges = popularity.new_tensor(AGE_EDGES), popularity.new_tensor(RATE_EDGES)

    def buckets(self) -> Tensor:
        """Return the experts' buckets int64: age bucket times `RATES` plus rate bucket."""
        rate = (self._prior + self._count).div_(PRIOR + self._weight)
        age_bucket = torch.bucketize(self._age, self._age_edges, right=True)
        return age_bucket.mul_(RATES).add_(torch.bucketize(rate, self._rate_edges, right=True))

    def add(self, used: Tensor) -> None:
        """Add a token.

        Args:
            used: Whether the token used each expert, bool.
        """
        self._count.mul_(DECAY).add_(used)
        self._weight.mul_(DECAY).add_(1)
        self._age.add_(1).masked_fill_(used, 1)


class HistoryStepper(TokenStepper):
    """Stores age and rate of every expert."""

    _predictor: History

    def __init__(self, predictor: History) -> None:
        self._table, self._popularity = predictor._table(), predictor._shares()  # noqa: SLF001
        super().__init__(predictor)

    def _reset(self) -> None:
        """Return to the start of a sequence."""
        super()._reset()
        self._past = [_Past(popularity.shape, popularity) for popularity in self._popularity]  # one per layer
        self._next = self._table[torch.stack([past.buckets() for past in self._past])]

    def _logits(self, token_id: int) -> Tensor:
        return self.logits()

    def logits(self) -> Tensor:
        """Return the logits ``(L, E)`` of every layer's next run, an array that changes with the next layer."""
        return self._next

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        """Process the routing of a layer."""
        super()._route(layer, experts, state)
        self.add(layer, torch.from_numpy(experts))

    def add(self, layer: int, experts: Tensor) -> None:
        """Add a layer's routing to the past, which changes `logits` but no scores.

        Args:
            layer: MoE layer, counted from 0.
            experts: Ids ``(n,)`` of its experts.
        """
        used = torch.zeros(self._popularity.shape[1], dtype=torch.bool)
        used[experts] = True
        self._past[layer].add(used)
        self._next[layer] = self._table[self._past[layer].buckets()]
