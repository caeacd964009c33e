"""Stepping predictors that know a token's scores, at all layers, when the token starts."""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.predictors.stepper import Stepper


class TokenStepper(Stepper):
    """A stepper of lookahead ``"token"``."""

    @abstractmethod
    def _logits(self, token_id: int) -> Tensor:
        """Return the next token's logits ``(L, E)``."""

    def _reset(self) -> None:
        """Forget the sequence."""
        self._scores = np.full(self._predictor.geometry.shape()[:2], np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        """Score all layers."""
        self._scores = self._predictor.probabilities(self._logits(token_id)[None])[0].numpy()

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        """Drop the layer's scores, which are history now."""
        self._scores = self._scores.copy()  # what `scores` returned before stays as it was
        self._scores[layer] = np.nan

    def scores(self) -> npt.NDArray[np.float32]:
        """Return ``(L, E)`` probabilities of the layers still to be routed."""
        return self._scores
