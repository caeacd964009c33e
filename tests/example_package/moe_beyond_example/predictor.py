"""repeats: an expert's probability, given whether the previous token used it."""

from typing import Any, ClassVar

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import TokenStepper


class Repeats(CountingPredictor):
    """Counts per layer: P(used | used by the previous token or not).

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        smoothing: Uses and misses that are added to the counts (default: 1).
    """

    architecture: ClassVar[str] = "repeats"
    activation = "sigmoid"
    used: Tensor
    chances: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int, smoothing: float = 1.0) -> None:
        super().__init__(geometry, vocab_size)
        self.smoothing = smoothing
        for name in ("used", "chances"):  # (2, L): experts that the previous token did not use, and did use
            self.register_buffer(name, torch.zeros(2, geometry.num_layers, dtype=torch.int64))

    @property
    def information(self) -> InformationSet:
        """Scores read the experts of earlier tokens and are available before the token."""
        return InformationSet(("token",), token_ids=False)

    def partial_fit(self, batch: Batch) -> None:
        """Count a batch."""
        selected, before = self._selected_and_before(batch)
        for row, group in enumerate((~before, before)):
            counted = group & batch.mask[:, :, None, None]
            self.used[row] += (counted & selected).sum((0, 1, 3))
            self.chances[row] += counted.sum((0, 1, 3))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``."""
        return self.logits(self._selected_and_before(batch)[1])[:, :, None]

    def logits(self, before: Tensor) -> Tensor:
        """Return logits ``(..., L, E)`` from a mask of the same shape: the experts of the previous token."""
        shares = (self.used + self.smoothing) / (self.chances + 2 * self.smoothing)
        unused, used = torch.logit(shares)[..., None]
        return torch.where(before, used, unused)

    def stepper(self) -> "RepeatsStepper":
        """Return a stepper, which stores the experts of one token."""
        return RepeatsStepper(self)

    def _selected_and_before(self, batch: Batch) -> tuple[Tensor, Tensor]:
        selected = batch.targets(self.geometry.num_experts)
        return selected, functional.pad(selected, (0, 0, 0, 0, 1, 0))[:, :-1]


class RepeatsStepper(TokenStepper):
    """Scores a token by the experts of the previous token."""

    _predictor: Repeats

    def _reset(self) -> None:
        """Forget the sequence."""
        super()._reset()
        self._experts = torch.zeros(self._predictor.geometry.shape()[:2], dtype=torch.bool)

    def _route(self, layer: int, experts: npt.NDArray[Any], state: npt.NDArray[Any] | None) -> None:
        """Store the layer's experts for the next token."""
        super()._route(layer, experts, state)
        self._experts[layer] = False
        self._experts[layer, torch.as_tensor(experts).long()] = True

    def _logits(self, token_id: int) -> Tensor:
        return self._predictor.logits(self._experts)
