"""popularity: how often each expert of each layer was chosen at all."""

from typing import ClassVar

import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import CountingPredictor, Stepper
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import Information
from moe_beyond.predictors.stepper import WholeTokenStepper
from moe_beyond.usage_profile import UsageProfile, default_hazard


class Popularity(CountingPredictor):
    """Counts per layer; the same scores for every token.

    P(e | l) = (count of e in layer l + K/E) / (tokens + 1): one imaginary token chose evenly.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
    """

    architecture: ClassVar[str] = "popularity"
    link = "sigmoid"

    counts: Tensor
    tokens: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__(geometry, vocab_size)
        layers, experts, _ = geometry.shape()
        self.register_buffer("counts", torch.zeros(layers, experts, dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @property
    def information(self) -> Information:
        """Nothing of the sequence, so known before the token."""
        return Information(("token",), token_ids=False)

    def observe(self, batch: Batch) -> None:
        """Count a batch."""
        self.counts += batch.targets(self.geometry.num_experts).sum((0, 1))
        self.tokens += batch.lengths.sum()

    def profile(self) -> UsageProfile:
        """Return the popularity, with a table that was not counted here."""
        return UsageProfile(self._shares().cpu().numpy(), default_hazard())

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``, the same everywhere."""
        return self._logits().expand(*batch.token_ids.shape, 1, -1, -1)

    def _shares(self) -> Tensor:
        _, experts, top_k = self.geometry.shape()
        return (self.counts.double() + top_k / experts) / (self.tokens + 1)

    def _logits(self) -> Tensor:
        return torch.logit(self._shares(), eps=1e-9).float()

    def stepper(self) -> Stepper:
        """Return a stepper; it keeps nothing."""
        return _PopularityStepper(self)


class _PopularityStepper(WholeTokenStepper):
    def _logits(self, token_id: int) -> Tensor:
        assert isinstance(self._predictor, Popularity)
        return self._predictor._logits()  # noqa: SLF001
