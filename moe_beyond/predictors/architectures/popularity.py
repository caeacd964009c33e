"""popularity: how often each expert of each layer was selected, whatever the token."""

from typing import ClassVar

import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.base import CountingPredictor, in_range
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import Stepper, TokenStepper
from moe_beyond.usage_profile import UsageProfile, default_hazard


class Popularity(CountingPredictor):
    """Counts each layer's experts; the scores are the same for every token.

    P(e | l) = (count of e in layer l + K/E) / (tokens + 1): one imaginary token used all experts evenly.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
    """

    architecture: ClassVar[str] = "popularity"
    activation: Activation = "sigmoid"

    counts: Tensor
    tokens: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__(geometry, vocab_size)
        layers, experts, _ = geometry.shape()
        self.register_buffer("counts", torch.zeros(layers, experts, dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @property
    def information(self) -> InformationSet:
        """Nothing of the sequence, so available before the token."""
        return InformationSet(("token",), token_ids=False)

    def partial_fit(self, batch: Batch) -> None:
        """Add a batch to the counts."""
        self.counts += batch.targets(self.geometry.num_experts).sum((0, 1))
        self.tokens += batch.lengths.sum()

    def profile(self) -> UsageProfile:
        """Return the usage profile: the popularity, and the default reuse table."""
        return UsageProfile(self._shares().cpu().numpy(), default_hazard())

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``, the same for every token."""
        return self._logits().expand(*batch.token_ids.shape, 1, -1, -1)

    def _shares(self) -> Tensor:
        _, experts, top_k = self.geometry.shape()
        return (self.counts.double() + top_k / experts) / (self.tokens + 1)

    def _logits(self) -> Tensor:
        return torch.logit(self._shares(), eps=1e-9).float()

    def weights_fault(self) -> str | None:
        """Describe counts that are negative or exceed the number of tokens."""
        return None if in_range(self.counts, 0, self.tokens) else "counts are not in 0..tokens"

    def stepper(self) -> Stepper:
        """Return a stepper; it has no state."""
        return _PopularityStepper(self)


class _PopularityStepper(TokenStepper):
    _predictor: Popularity

    def _logits(self, token_id: int) -> Tensor:
        return self._predictor._logits()  # noqa: SLF001
