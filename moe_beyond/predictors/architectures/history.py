"""history: what an expert's past in the sequence, and in training, says of its next use."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import Information
from moe_beyond.predictors.stepper import WholeTokenStepper
from moe_beyond.usage_profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES, UsageProfile

AGES, RATES = len(AGE_EDGES) + 1, len(RATE_EDGES) + 1


class History(Popularity):
    """Looks up an expert's age and rate (`moe_beyond.usage_profile`) in one table for all layers and experts.

    P = (uses + 2 K/E) / (trials + 2) in the bucket of both: of the times that an expert of any layer was in it, how
    often the next token used the expert; two imaginary tokens chose evenly.

    A batch is counted with the popularity so far, its own tokens included: the order of batches matters a little, most
    to buckets that few experts are ever in.

    Every row starts without a past, also a later piece of a long sequence, as everywhere in this package: fit with
    ``data.max_tokens`` above the longest.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
    """

    architecture: ClassVar[str] = "history"

    uses: Tensor
    trials: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__(geometry, vocab_size)
        self.register_buffer("uses", torch.zeros(AGES, RATES, dtype=torch.int64))
        self.register_buffer("trials", torch.zeros(AGES, RATES, dtype=torch.int64))

    @property
    def information(self) -> Information:
        """Experts of earlier tokens."""
        return Information(("token",), token_ids=False)

    def observe(self, batch: Batch) -> None:
        """Count a batch."""
        super().observe(batch)
        used = batch.targets(self.geometry.num_experts)
        found = self.trials.new_zeros(2 * AGES * RATES)
        for token, (bucket, now) in enumerate(zip(self._buckets(used), used.unbind(1), strict=True)):
            outcome = bucket.add_(now, alpha=AGES * RATES)
            found += torch.bincount(outcome[batch.lengths > token].flatten(), minlength=len(found))
        unused, uses = found.view(2, AGES, RATES)
        self.uses += uses
        self.trials += unused + uses

    def profile(self) -> UsageProfile:
        """Return the popularity and the table."""
        return UsageProfile(self._shares().cpu().numpy(), self._hazard().cpu().numpy())

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``."""
        used, table = batch.targets(self.geometry.num_experts), self._table()
        logits = table.new_empty(used.shape)
        for token, bucket in enumerate(self._buckets(used)):
            logits[:, token] = table[bucket]
        return logits[:, :, None]

    def _buckets(self, used: Tensor) -> Iterator[Tensor]:
        """Yield for each token the buckets ``(B, L, E)`` in which it finds the experts.

        Args:
            used: ``(B, T, L, E)`` bool.
        """
        past = _Past(used[:, 0].shape, self._shares())
        for now in used.unbind(1):
            yield past.buckets()
            past.add(now)

    def _hazard(self) -> Tensor:
        _, experts, top_k = self.geometry.shape()
        return (self.uses.double() + 2 * top_k / experts) / (self.trials + 2)

    def _table(self) -> Tensor:
        """Return ``(64,)`` logits by bucket."""
        return torch.logit(self._hazard(), eps=1e-9).float().flatten()

    def stepper(self) -> "HistoryStepper":
        """Return a stepper; its state is two numbers an expert."""
        return HistoryStepper(self)


class _Past:
    """The past of experts, in double precision: rates that differ by rounding may fall into different buckets.

    Args:
        shape: Of what is held, ``(..., E)``.
        popularity: ``(..., E)``, broadcast to it.
    """

    def __init__(self, shape: Sequence[int], popularity: Tensor) -> None:
        self._prior = PRIOR * popularity
        self._count = popularity.new_zeros(shape)
        self._weight = popularity.new_zeros(())
        self._age = torch.full_like(self._count, -torch.inf)  # below every edge, like 0, and adding 1 leaves it there
        self._age_edges, self._rate_edges = popularity.new_tensor(AGE_EDGES), popularity.new_tensor(RATE_EDGES)

    def buckets(self) -> Tensor:
        """Return the experts' buckets, int64: of age times `RATES` plus of rate."""
        rate = (self._prior + self._count).div_(PRIOR + self._weight)
        age_bucket = torch.bucketize(self._age, self._age_edges, right=True)
        return age_bucket.mul_(RATES).add_(torch.bucketize(rate, self._rate_edges, right=True))

    def add(self, used: Tensor) -> None:
        """Add a token, given which experts it used."""
        self._count.mul_(DECAY).add_(used)
        self._weight.mul_(DECAY).add_(1)
        self._age.add_(1).masked_fill_(used, 1)


class HistoryStepper(WholeTokenStepper):
    """Keeps every expert's past."""

    def __init__(self, predictor: History) -> None:
        self._table, self._popularity = predictor._table(), predictor._shares()  # noqa: SLF001
        super().__init__(predictor)

    def _reset(self) -> None:
        """Forget the sequence."""
        super()._reset()
        self._past = [_Past(popularity.shape, popularity) for popularity in self._popularity]  # by layer
        self._next = self._table[torch.stack([past.buckets() for past in self._past])]

    def _logits(self, token_id: int) -> Tensor:
        return self.logits()

    def logits(self) -> Tensor:
        """Return the logits ``(L, E)`` of the next run of every layer; not to be kept."""
        return self._next

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        """Learn what a layer was routed to."""
        super()._route(layer, experts, state)
        self.add(layer, torch.from_numpy(experts))

    def add(self, layer: int, experts: Tensor) -> None:
        """Take a layer's experts ``(n,)`` into their past; no scores change but those of `logits`."""
        used = torch.zeros(self._popularity.shape[1], dtype=torch.bool)
        used[experts] = True
        self._past[layer].add(used)
        self._next[layer] = self._table[self._past[layer].buckets()]
