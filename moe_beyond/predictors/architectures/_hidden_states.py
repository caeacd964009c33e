"""Base of predictors that read one kind of hidden state of the current token and nothing else.

Each layer of a token provides one hidden state: the input of its router when it is routed, or the input of the next MoE
layer before its attention when it is computed. The experts of layer l are predicted from the state of layer l - h.
Layers l < h have constant scores, which are available when the token starts.

If the traces store projected states, the predictor keeps their projection, and projects states of the model's width.
"""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import StateKind
from moe_beyond.predictors.modules.state_projection import ProjectedStates, StateProjections
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.training_stats import TrainingStats


class HiddenStatePredictor(Predictor):
    """A predictor of layers that are ``ahead`` of a hidden state; `information` names the kind of states.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the hidden states, W.
        ahead: Layers from a state to each predicted layer, ascending, each at least 1.
        projected_from: Width of the model's hidden states, D, if those of the traces are projected (default: None).

    Raises:
        UserError: The traces, which determine the widths, contain no hidden states.
    """

    hidden_size: int

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        hidden_size: int,
        ahead: tuple[int, ...],
        projected_from: int | None = None,
    ) -> None:
        super().__init__(geometry, vocab_size)
        self.ahead = ahead
        self.projections = StateProjections(
            self.architecture, geometry.num_layers, hidden_size, projected_from, self.information.hidden_states
        )
        self.hidden_size, self.projected_from = hidden_size, projected_from

    def prepare(self, stats: TrainingStats) -> None:
        """Copy the projection of the traces, if their states are projected.

        Args:
            stats: Statistics of the training split.

        Raises:
            UserError: The traces have no projection, or one of another shape.
        """
        self.projections.copy_from(stats.projection)

    @property
    def _kind(self) -> StateKind:
        [kind] = self.information.hidden_states
        return kind

    def projection_of(self, kind: StateKind) -> ProjectedStates | None:
        """Return the projection of the states; None if they are not projected."""
        return self.projections.of(kind)

    @abstractmethod
    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Return the logits ``(N, n, E)`` of n layers.

        Args:
            states: Hidden states ``(N, n, W)`` float32 that are available ``ahead`` layers before each of these layers.
            ahead: Layers from the states to these layers, at least 1.
            layers: The n layers.
        """

    @abstractmethod
    def prior_logits(self) -> Tensor:
        """Return the constant logits ``(min(H, L), E)`` of the first layers, H being the largest of ``ahead``."""

    def align_states(self, batch: Batch) -> Tensor:
        """Return the hidden state that is available once each layer is routed or computed, ``(B, T, L, W)``.

        Args:
            batch: Batch with hidden states.

        Raises:
            UserError: The batch has no hidden states.
        """
        states = self.projections.read(batch, self._kind)
        if self._kind == "layer_inputs":
            states = functional.pad(states[:, :, 1:], (0, 0, 0, 1))
        return states

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``."""
        states, layers = self.align_states(batch).float().flatten(0, 1), self.geometry.num_layers
        prior = self.prior_logits()
        slices = []
        for ahead in self.ahead:
            early = min(ahead, layers)
            late = self.logits_from_states(states[:, : layers - early], ahead, slice(early, layers))
            slices.append(torch.cat([prior[:early].expand(len(states), -1, -1), late], 1))
        logits = torch.stack(slices, 1)
        return logits.view(*batch.token_ids.shape, *logits.shape[1:])

    def stepper(self) -> Stepper:
        """Return a stepper; its state is the scores of one token."""
        return _HiddenStateStepper(self)


class _HiddenStateStepper(Stepper):
    _predictor: HiddenStatePredictor

    def _reset(self) -> None:
        self._scores = np.full(self._shape[:2], np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        predictor, layers = self._predictor, self._shape[0]
        self._reset()
        for layer, logits in enumerate(predictor.prior_logits()):
            # The smallest lookahead for which the layer has a constant score.
            index = next(i for i, ahead in enumerate(predictor.ahead) if ahead > layer or ahead >= layers)
            self._set_scores(layer, index, logits)

    @torch.inference_mode()
    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        self._scores = self._scores.copy()  # arrays returned by `scores` before stay unchanged
        self._scores[layer] = np.nan
        if state is not None:
            self._predict(layer, state, layer)

    @torch.inference_mode()
    def _compute(self, layer: int, state: npt.NDArray[np.float32] | None) -> None:
        if state is not None:
            self._scores = self._scores.copy()
            self._predict(layer, state, layer + 1)

    def _predict(self, layer: int, state: npt.NDArray[np.float32], projected: int) -> None:
        """Predict later layers from the state of a layer, which has the projection of layer ``projected``."""
        predictor, seen = self._predictor, torch.from_numpy(state)
        [kind] = predictor.information.hidden_states
        projection = predictor.projection_of(kind)
        if projection is not None and len(seen) == predictor.projected_from:
            seen = projection.one(seen, projected)
        states = seen[None, None]
        for index, ahead in enumerate(predictor.ahead):
            if (target := layer + ahead) < len(self._scores):
                logits = predictor.logits_from_states(states, ahead, slice(target, target + 1))
                self._set_scores(target, index, logits[0, 0])

    def scores(self) -> npt.NDArray[np.float32]:
        return self._scores

    def _set_scores(self, layer: int, index: int, logits: Tensor) -> None:
        """Set the scores of a layer from its logits ``(E,)`` of the lookahead at an index."""
        probabilities = self._predictor.step_probabilities(
            logits[None].numpy(), np.array([index], np.int64), np.array([layer], np.int64)
        )
        self._scores[layer] = probabilities[0]
