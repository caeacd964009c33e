"""What predictors share that read a state of the present token and nothing else.

With each layer of a token one state is told: what its router read, or what the next MoE layer reads before its
attention. From the one told with layer l - h, the experts of layer l are predicted; a layer before which none was told
has scores that are always the same, known when the token starts.
"""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.stepper import Stepper


class HiddenStatePredictor(Predictor):
    """A predictor of lookaheads ``ahead`` from hidden states; `information` says which.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        hidden_size: Width of the states, D.
        ahead: Lookaheads, ascending, each at least 1.

    Raises:
        UserError: The traces, which tell the width, hold no hidden states.
    """

    def __init__(self, geometry: Geometry, vocab_size: int, hidden_size: int, ahead: tuple[int, ...]) -> None:
        super().__init__(geometry, vocab_size)
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise UserError(
                f"{self.architecture} reads hidden states, and the traces hold none; collect them with --record "
                "experts,gate_weights,hidden_states"
            )
        self.hidden_size, self.ahead = hidden_size, ahead

    @abstractmethod
    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Return logits ``(N, n, E)`` of n layers.

        Args:
            states: ``(N, n, D)`` float32, of each layer the state told ``ahead`` layers before it.
            ahead: The lookahead.
            layers: The layers.
        """

    @abstractmethod
    def prior_logits(self) -> Tensor:
        """Return logits ``(min(H, L), E)`` of the first layers where no state was told, H the largest lookahead."""

    def told(self, batch: Batch) -> Tensor:
        """Return the states told with each layer: ``(B, T, L, D)``.

        Raises:
            UserError: The batch has none.
        """
        states = getattr(batch, str(self.information.hidden_states))
        if states is None:
            raise UserError(f"{self.architecture} reads hidden states, and the batch has none")
        if self.information.hidden_states == "layer_inputs":
            states = functional.pad(states[:, :, 1:], (0, 0, 0, 1))
        found: Tensor = states
        return found

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``."""
        states, layers = self.told(batch).float().flatten(0, 1), self.geometry.num_layers
        first = self.prior_logits()
        slices = []
        for ahead in self.ahead:
            waiting = min(ahead, layers)
            known = self.logits_from_states(states[:, : layers - waiting], ahead, slice(waiting, layers))
            slices.append(torch.cat([first[:waiting].expand(len(states), -1, -1), known], 1))
        found = torch.stack(slices, 1)
        return found.view(*batch.token_ids.shape, *found.shape[1:])

    def stepper(self) -> Stepper:
        """Return a stepper; it keeps the scores of one token."""
        return _FromStatesStepper(self)


class _FromStatesStepper(Stepper):
    _predictor: HiddenStatePredictor

    def _reset(self) -> None:
        self._scores = np.full(self._predictor.geometry.shape()[:2], np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        predictor, layers = self._predictor, self._predictor.geometry.num_layers
        self._reset()
        for layer, logits in enumerate(predictor.prior_logits()):
            # Of the lookaheads that no layer is before, the smallest.
            index = next(i for i, ahead in enumerate(predictor.ahead) if ahead > layer or ahead >= layers)
            self._put(layer, index, logits)

    @torch.inference_mode()
    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        predictor = self._predictor
        self._scores = self._scores.copy()  # what `scores` returned before stays as it was
        self._scores[layer] = np.nan
        if state is None:
            return
        states = torch.from_numpy(state)[None, None]
        for index, ahead in enumerate(predictor.ahead):
            if (target := layer + ahead) < len(self._scores):
                self._put(target, index, predictor.logits_from_states(states, ahead, slice(target, target + 1))[0, 0])

    def scores(self) -> npt.NDArray[np.float32]:
        return self._scores

    def _put(self, layer: int, index: int, logits: Tensor) -> None:
        found = self._predictor.step_probabilities(
            logits[None].numpy(), np.array([index], np.int64), np.array([layer], np.int64)
        )
        self._scores[layer] = found[0]
