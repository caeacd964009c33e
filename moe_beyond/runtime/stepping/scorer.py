"""Scores of a predictor for the sequence that a running model reads."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor
    from moe_beyond.predictors.online import OnlineUpdates

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class SequenceScorer:
    """Follows one sequence and steps a predictor while single tokens are decoded.

    A forward that reads several tokens gets no scores, as in a replay of chunks; the predictor observes its tokens
    before the next single one. After a forward that belongs to no sequence there are no scores until the next sequence
    begins.

    Args:
        predictor: Predictor of the model's routing.
        online: Online updates of the predictor, which every token changes (default: None).

    Attributes:
        active: Whether the forward has scores.
    """

    def __init__(self, predictor: "Predictor", online: "OnlineUpdates | None" = None) -> None:
        self._stepper = predictor.stepper() if online is None else online.stepper()
        self._layers, self._updates = predictor.geometry.num_layers, online is not None
        self._follows = False  # whether the forward belongs to the sequence
        self._chunk: Ints | None = None
        self._routed: list[Ints] = []
        self.active = False

    def start(self, token_ids: Ints | None, past: int) -> Scores | None:
        """Begin a forward.

        Args:
            token_ids: Tokens that it reads, ``(T,)``; None if it belongs to no sequence, as `SequenceLog` decides.
            past: Number of tokens of the sequence that were read before.

        Returns:
            Scores ``(L, E)`` of the token's layers; None without scores.

        Raises:
            UserError: A token id is not in the predictor's vocabulary.
        """
        self.active = False
        self._follows = token_ids is not None
        if token_ids is None:
            return None
        if past == 0:
            self.end()
            self._stepper.reset()
            self._chunk = None
        self._observe_chunk()
        if len(token_ids) > 1:
            self._chunk, self._routed = token_ids, []
            return None
        self._stepper.observe_token(int(token_ids[0]))
        self.active = True
        return self._stepper.scores()

    def routed(self, layer: int, experts: Ints, state: npt.NDArray[np.floating] | None = None) -> Scores | None:
        """Observe the routing of a layer.

        Args:
            layer: Position of the layer among the MoE layers.
            experts: Chosen experts, ``(T, K)``.
            state: Input ``(D,)`` of the layer's router, if the predictor reads it (default: None).

        Returns:
            Scores ``(L, E)`` of each layer's next run; None without scores.
        """
        if not self._follows:
            return None
        if self.active:
            self._stepper.observe_layer(layer, experts[0], state)
        else:
            self._routed.append(experts)
        return self._stepper.scores() if self.active else None

    def computed(self, layer: int, state: npt.NDArray[np.floating] | None = None) -> Scores | None:
        """Observe that the layer that was routed last is computed.

        Args:
            layer: Position of the layer among the MoE layers.
            state: Input ``(D,)`` of the next layer, if the predictor reads it (default: None).

        Returns:
            Scores ``(L, E)`` of each layer's next run; None without scores.
        """
        if not self.active:
            return None
        self._stepper.observe_computed(layer, state)
        return self._stepper.scores()

    def end(self) -> None:
        """Let online updates observe the last tokens of a sequence that ends with a complete chunk."""
        if self._updates and len(self._routed) == self._layers:
            self._observe_chunk()

    def _observe_chunk(self) -> None:
        """Observe the tokens of the chunk, which is complete."""
        if self._chunk is not None:
            self._stepper.observe_tokens(self._chunk, np.stack(self._routed, axis=1))
            self._chunk = None
