"""Steppers: the decoding form of predictors, with O(1) state per sequence."""

from abc import ABC, abstractmethod
from operator import index
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.information import InformationSet
from moe_beyond.traces.schema import padding_id

LARGEST_STATE = float(np.finfo(np.float16).max)
"""Largest absolute value of a hidden state, as traces store it."""


class SteppedPredictor(Protocol):
    """The members of a predictor that a stepper uses."""

    geometry: Geometry
    vocab_size: int

    @property
    def hidden_size(self) -> int | None:
        """Width W of the hidden states that the predictor reads; None if it reads none."""

    @property
    def projected_from(self) -> int | None:
        """Width D of the model's hidden states if the predictor projects them; otherwise None."""

    @property
    def information(self) -> InformationSet:
        """Everything that the predictor reads."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return calibrated probabilities of logits ``(..., H, L, E)``."""

    def step_probabilities(
        self, logits: npt.NDArray[np.float32], lookaheads: npt.NDArray[np.int64], layers: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return calibrated probabilities of a few layers' logits ``(n, E)``."""


class Stepper(ABC):
    """Scores one sequence while it is decoded, with state that does not grow with the sequence.

    Call order for a token: `observe_token`, then `observe_layer` for l = 0 .. L-1, each once; `scores` at any time.
    `observe_computed` may follow each `observe_layer` once; without it there is no score of lookahead ``"computed"``
    for the next layer. Calls out of order and values out of range are rejected before any state changes.

    A subclass implements `_reset`, `_start_token`, `_route` and `scores`, and `_compute` if the predictor reads layer
    inputs. They receive checked arguments only.

    Args:
        predictor: Predictor whose probabilities are computed. The constructor calls `_reset`, so a subclass sets the
            attributes that `_reset` needs before it calls this constructor.
    """

    _predictor: SteppedPredictor

    def __init__(self, predictor: SteppedPredictor) -> None:
        self._predictor = predictor
        information = predictor.information
        self._shape = predictor.geometry.shape()
        self._valid_experts = frozenset(range(self._shape[1]))
        self._vocab_size = predictor.vocab_size if information.token_ids else None
        self._states = information.hidden_states
        self._state_widths = tuple(width for width in (predictor.hidden_size, predictor.projected_from) if width)
        self.reset()

    @abstractmethod
    def _reset(self) -> None:
        """Return to the start of a sequence."""

    @abstractmethod
    def _start_token(self, token_id: int) -> None:
        """Start a token.

        Args:
            token_id: Id of the token, within the vocabulary.
        """

    @abstractmethod
    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        """Process the routing of the next layer of the current token.

        Args:
            layer: MoE layer, counted from 0; each layer comes once per token, in order.
            experts: Ids ``(n,)`` of different experts, n <= K.
            state: Finite input of the layer's router, ``(W,)`` or ``(D,)``; None if none was given or the predictor
                reads no router inputs.
        """

    def _compute(self, layer: int, state: npt.NDArray[np.float32] | None) -> None:  # noqa: B027 (optional)
        """Process the computing of the layer that was routed last; does nothing by default.

        Args:
            layer: MoE layer, counted from 0.
            state: Finite input of the next MoE layer before its attention, ``(W,)`` or ``(D,)``; None if none was given
                or the predictor reads no layer inputs.
        """

    @abstractmethod
    def scores(self) -> npt.NDArray[np.float32]:
        """Return the probabilities ``(L, E)`` float32 of each layer's next run; NaN if no score is available.

        If several lookaheads reach a layer, the score is that of the first in the order of
        `moe_beyond.lookahead.Lookahead`. The next run of a layer that is already routed belongs to the next token; only
        lookahead ``"next"`` predicts it.
        """

    def reset(self) -> None:
        """Return to the start of a sequence."""
        self._next_layer = self._shape[0]  # L: a token comes next
        self._started = self._computed = False
        self._reset()

    def observe_token(self, token_id: int) -> None:
        """Start a token, none of whose layers is routed.

        Args:
            token_id: Id of the token.

        Raises:
            UserError: Layers of the token before are not routed yet, or the id is not in the vocabulary.
        """
        if self._next_layer != self._shape[0]:
            raise UserError(
                f"observe_token: layer {self._next_layer} of the token before is not observed yet; "
                "observe all its layers, or reset"
            )
        token_id = self._checked_token(token_id)
        self._next_layer, self._started = 0, True
        self._start_token(token_id)

    def observe_layer(self, layer: int, experts: npt.ArrayLike, state: npt.ArrayLike | None = None) -> None:
        """Observe the experts, at most K, to which ``layer`` routed the current token.

        Args:
            layer: MoE layer, counted from 0.
            experts: Ids ``(n,)`` of the experts, in any order.
            state: Input ``(D,)`` of the layer's router, for predictors that read router inputs; others ignore it. A
                predictor of projected states takes the model's state and the projected one (default: None).

        Raises:
            UserError: No token is started, or the layer is not the next one. Or there are more than K experts, or they
                are repeated or out of range. Or the hidden state has another width or is not finite.
        """
        if layer != self._next_layer or layer >= self._shape[0]:
            raise self._out_of_order(layer)
        # These checks take a microsecond: for so few experts, Python sets are faster than numpy.
        try:
            routed = np.asarray(experts)
            ids = routed.tolist()
            different = set(ids)
        except (TypeError, ValueError):
            raise self._wrong_experts(experts) from None
        if routed.dtype.kind not in "iu" and ids:
            raise self._wrong_experts(experts)
        if not (len(different) == len(ids) <= self._shape[2] and different <= self._valid_experts):
            raise self._wrong_experts(experts)
        hidden_state = None
        if state is not None and "router_inputs" in self._states:
            hidden_state = self._checked_state(state, "observe_layer")
        self._next_layer += 1
        self._computed = False
        self._route(layer, routed.astype(np.int64), hidden_state)

    def observe_computed(self, layer: int, state: npt.ArrayLike | None = None) -> None:
        """Observe that ``layer``, which `observe_layer` observed last, is computed.

        Args:
            layer: MoE layer, counted from 0.
            state: Input ``(D,)`` of the next MoE layer, before its attention, for predictors that read layer inputs;
                others ignore it. A predictor of projected states takes the model's state and the projected one
                (default: None, as after the last layer).

        Raises:
            UserError: Another layer was observed last, the layer is observed as computed already, or it is the last one
                and has a state. Or the hidden state has another width or is not finite.
        """
        if layer != self._next_layer - 1 or not self._started or self._computed:
            raise self._not_computed(layer)
        hidden_state = None
        if state is not None and "layer_inputs" in self._states:
            if self._next_layer == self._shape[0]:
                raise UserError(
                    f"observe_computed: no MoE layer follows layer {layer}, and a state is given; give no state"
                )
            hidden_state = self._checked_state(state, "observe_computed")
        self._computed = True
        self._compute(layer, hidden_state)

    def observe_tokens(self, token_ids: npt.ArrayLike, experts: npt.ArrayLike) -> None:
        """Observe a prefix at once.

        Hidden states are not needed: predictors read only those of the current token.

        Args:
            token_ids: Token ids ``(T,)``.
            experts: Expert ids ``(T, L, K)``; padding is skipped.

        Raises:
            UserError: The shapes differ, or a value is rejected by `observe_token` or `observe_layer`.
        """
        ids, routed = _integers(token_ids, "observe_tokens: token_ids"), _integers(experts, "observe_tokens: experts")
        layers, _, top_k = self._shape
        if ids.ndim != 1 or (ids.size and routed.shape != (ids.size, layers, top_k)):
            raise UserError(
                f"observe_tokens: token ids have shape {ids.shape} and experts have shape {routed.shape}; "
                f"pass (T,) and (T, {layers}, {top_k})"
            )
        for token_id, by_layer in zip(ids.tolist(), routed, strict=True):
            self.observe_token(token_id)
            for layer, layer_experts in enumerate(by_layer):
                self.observe_layer(layer, layer_experts[layer_experts != padding_id(layer_experts.dtype)])

    def _checked_token(self, token_id: int) -> int:
        try:
            number = index(token_id)
        except TypeError as error:
            raise UserError(f"observe_token: a token id must be a whole number (got {token_id!r})") from error
        if self._vocab_size is not None and not 0 <= number < self._vocab_size:
            raise UserError(f"observe_token: token id {number} is not in 0..{self._vocab_size - 1}")
        return number

    def _out_of_order(self, layer: int) -> UserError:
        layers = self._shape[0]
        if not self._started:
            return UserError(f"observe_layer: layer {layer} comes before any token; call observe_token first")
        if self._next_layer == layers:
            return UserError(
                f"observe_layer: all {layers} layers of the token are observed (got layer {layer}); "
                "call observe_token for the next one"
            )
        return UserError(
            f"observe_layer: layer {self._next_layer} is next (got layer {layer}); observe the layers in order"
        )

    def _not_computed(self, layer: int) -> UserError:
        """Return the error for a layer that `observe_computed` rejects."""
        if not self._started or self._next_layer == 0:
            return UserError(
                f"observe_computed: layer {layer} comes before any layer of the token; call observe_layer first"
            )
        if layer != self._next_layer - 1:
            return UserError(
                f"observe_computed: layer {self._next_layer - 1} was observed last (got layer {layer}); "
                "observe each layer as computed before the next one is routed"
            )
        return UserError(
            f"observe_computed: layer {layer} is observed as computed already; call observe_layer for the next one, or "
            "observe_token"
        )

    def _wrong_experts(self, experts: npt.ArrayLike) -> UserError:
        """Return the error for experts that `observe_layer` rejects."""
        routed = _integers(experts, "observe_layer: experts")
        if routed.ndim != 1:
            return UserError(f"observe_layer: experts must have shape (n,), the ids of one layer (got {routed.shape})")
        ids, (_, num_experts, top_k) = routed.tolist(), self._shape
        if len(ids) > top_k:
            return UserError(f"observe_layer: a token has at most {top_k} experts in a layer (got {len(ids)})")
        if wrong := [expert for expert in ids if not 0 <= expert < num_experts]:
            return UserError(f"observe_layer: expert {wrong[0]} is not in 0..{num_experts - 1}")
        return UserError(f"observe_layer: an expert is repeated (got {ids})")

    def _checked_state(self, state: npt.ArrayLike, where: str) -> npt.NDArray[np.float32]:
        try:
            with np.errstate(over="ignore"):  # refused below
                values = np.asarray(state, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: the hidden state is not an array of numbers ({error})") from error
        if values.ndim != 1 or len(values) not in self._state_widths:
            shapes = " or ".join(f"({width},)" for width in self._state_widths)
            raise UserError(f"{where}: the hidden state must have shape {shapes}, as in training (got {values.shape})")
        if not (np.abs(values) <= LARGEST_STATE).all():
            raise UserError(f"{where}: the hidden state is not finite in float16, as traces store it")
        return values


class TokenStepper(Stepper):
    """A stepper for lookahead ``"token"``: all layers are scored when the token starts."""

    @abstractmethod
    def _logits(self, token_id: int) -> Tensor:
        """Return the logits ``(L, E)`` of a token that starts."""

    def _reset(self) -> None:
        """Return to the start of a sequence."""
        self._scores = np.full(self._shape[:2], np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        """Score all layers."""
        self._scores = self._predictor.probabilities(self._logits(token_id)[None])[0].numpy()

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        """Remove the layer's scores, which are out of date."""
        self._scores = self._scores.copy()  # arrays returned by `scores` before stay unchanged
        self._scores[layer] = np.nan

    def scores(self) -> npt.NDArray[np.float32]:
        """Return the probabilities ``(L, E)`` of the layers that are not routed yet, and NaN for others."""
        return self._scores


def _integers(values: npt.ArrayLike, name: str) -> npt.NDArray[np.integer[Any]]:
    """Return values as an array of integers, whatever its shape.

    Args:
        values: Values to convert.
        name: Name of the values in error messages.

    Raises:
        UserError: The values are not integers.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} are not an array of whole numbers ({error})") from error
    if array.dtype.kind not in "iu":
        if array.size:
            raise UserError(f"{name} are not whole numbers (got {array.dtype})")
        array = array.astype(np.int64)
    return array
