"""What every predictor is: a torch module from a batch to scores, and a stepper for decoding."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import subset_shift
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.numba_activation import ACTIVATIONS, apply_activation_numba
from moe_beyond.pretrained import find_pretrained
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.schema import padding_id


@dataclass(frozen=True)
class TrainingStats:
    """What a predictor may know of the training split's text before it is fitted.

    Attributes:
        token_counts: ``(V,)`` int64, how often each token id occurs in the training split.
        token_strings: The string of every token id, or None where the trace set carries no tokenizer.
        expert_counts: Given ``(n,)`` token ids, counts how often the training split routed each to each expert:
            ``(n, L*E)`` int32.
        routers: Those of the model, where the trace set holds them.
    """

    token_counts: npt.NDArray[np.int64]
    token_strings: Sequence[str] | None
    expert_counts: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]]
    routers: Routers | None = None

    def most_frequent(self, most: int, least: int = 1) -> npt.NDArray[np.int64]:
        """Return the ids of the most frequent tokens, from the most frequent on, ties by id.

        Args:
            most: How many at most.
            least: Occurrences that each must have.
        """
        frequent = np.argsort(-self.token_counts, kind="stable")[:most]
        return frequent[self.token_counts[frequent] >= least]


class Stepper(ABC):
    """Scores one sequence as it is decoded, with state that does not grow with the sequence.

    Call order for a token: `observe_token`, then `observe_layer` for l = 0 .. L-1, each once; `scores` at any time.
    Calls out of order and values out of range are refused before anything changes.

    A subclass implements `_reset`, `_start_token`, `_route` and `scores`; they receive checked arguments only.

    Args:
        predictor: The predictor whose probabilities are computed. `_reset` is called at once: a subclass sets up what
            that needs first.
    """

    _predictor: "Predictor"

    def __init__(self, predictor: "Predictor") -> None:
        self._predictor = predictor
        information = predictor.information
        self._shape = predictor.geometry.shape()
        self._valid_experts = frozenset(range(self._shape[1]))
        self._vocabulary = predictor.vocab_size if information.token_ids else None
        self._state_size = None if information.hidden_states is None else int(predictor.hidden_size)  # type: ignore[arg-type]
        self.reset()

    @abstractmethod
    def _reset(self) -> None:
        """Forget the sequence."""

    @abstractmethod
    def _start_token(self, token_id: int) -> None:
        """Start a token with a valid id."""

    @abstractmethod
    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        """Take in the next layer of the current token.

        Args:
            layer: MoE layer, counted from 0; each comes once per token, in order.
            experts: ``(n,)`` different ids, n <= K.
            state: ``(D,)``, finite; None where none was given, or the predictor reads none.
        """

    @abstractmethod
    def scores(self) -> npt.NDArray[np.float32]:
        """Return ``(L, E)`` float32 probabilities of what is known of each layer's next run, NaN for nothing.

        Where several lookaheads reach a layer, the score is that of the smallest. The next run of a layer that is
        routed is that by the next token, of which only lookahead ``"next"`` knows.
        """

    def reset(self) -> None:
        """Forget the sequence."""
        self._layer_due = self._shape[0]  # a token is due
        self._started = False
        self._reset()

    def observe_token(self, token_id: int) -> None:
        """Start a token: its id is known, none of its layers is routed.

        Raises:
            UserError: Layers of the token before are not routed yet, or the id is not one of the vocabulary.
        """
        if self._layer_due != self._shape[0]:
            raise UserError(
                f"observe_token: layer {self._layer_due} of the token before is not observed yet; "
                "observe all its layers, or reset"
            )
        token_id = self._checked_token(token_id)
        self._layer_due, self._started = 0, True
        self._start_token(token_id)

    def observe_layer(self, layer: int, experts: npt.ArrayLike, state: npt.ArrayLike | None = None) -> None:
        """Learn which experts, K of them or fewer, ``layer`` of the current token was routed to.

        Args:
            layer: MoE layer, counted from 0.
            experts: ``(n,)`` ids of the experts, in any order.
            state: ``(D,)``, for predictors whose information set has hidden states: what the layer's router read; or,
                where those are layer inputs, what the next MoE layer reads before its attention, None after the last.

        Raises:
            UserError: No token is started, the layer is not the next one, the experts are too many, twice the same or
                out of range, or the state has another width or is not finite.
        """
        if layer != self._layer_due or layer >= self._shape[0]:
            raise self._out_of_order(layer)
        # These checks cost a microsecond: of so few experts, sets of Python are faster than numpy.
        try:
            chosen = np.asarray(experts)
            ids = chosen.tolist()
            different = set(ids)
        except (TypeError, ValueError):
            raise self._wrong_experts(experts) from None
        if chosen.dtype.kind not in "iu" and ids:
            raise self._wrong_experts(experts)
        if not (len(different) == len(ids) <= self._shape[2] and different <= self._valid_experts):
            raise self._wrong_experts(experts)
        read = None if state is None or self._state_size is None else self._checked_state(state)
        self._layer_due += 1
        self._route(layer, chosen.astype(np.int64), read)

    def observe_tokens(self, token_ids: npt.ArrayLike, experts: npt.ArrayLike) -> None:
        """Take in a prefix at once: ``(T,)`` token ids and ``(T, L, K)`` experts.

        Hidden states are not taken: predictors read only those of the present token.

        Raises:
            UserError: The shapes differ, or as `observe_token` and `observe_layer` do.
        """
        ids, routed = _integers(token_ids, "observe_tokens: token_ids"), _integers(experts, "observe_tokens: experts")
        layers, _, top_k = self._shape
        if ids.ndim != 1 or (ids.size and routed.shape != (ids.size, layers, top_k)):
            raise UserError(
                f"observe_tokens: token ids of shape {ids.shape} with experts of shape {routed.shape}; "
                f"write (T,) and (T, {layers}, {top_k})"
            )
        for token_id, by_layer in zip(ids.tolist(), routed, strict=True):
            self.observe_token(token_id)
            for layer, chosen in enumerate(by_layer):
                self.observe_layer(layer, chosen[chosen != padding_id(chosen.dtype)])

    def _checked_token(self, token_id: int) -> int:
        try:
            number = index(token_id)
        except TypeError as error:
            raise UserError(f"observe_token: a token id is a whole number (got {token_id!r})") from error
        if self._vocabulary is not None and not 0 <= number < self._vocabulary:
            raise UserError(f"observe_token: token id {number} is not one of 0..{self._vocabulary - 1}")
        return number

    def _out_of_order(self, layer: int) -> UserError:
        layers = self._shape[0]
        if not self._started:
            return UserError(f"observe_layer: layer {layer} comes before any token; call observe_token first")
        if self._layer_due == layers:
            return UserError(
                f"observe_layer: all {layers} layers of the token are observed (got layer {layer}); "
                "call observe_token for the next one"
            )
        return UserError(f"observe_layer: layer {self._layer_due} is next (got layer {layer}); layers come in order")

    def _wrong_experts(self, experts: npt.ArrayLike) -> UserError:
        """Say what is wrong with experts that `observe_layer` refuses."""
        chosen = _integers(experts, "observe_layer: experts")
        if chosen.ndim != 1:
            return UserError(f"observe_layer: experts have shape {chosen.shape}, not (n,), the ids of one layer")
        ids, (_, num_experts, top_k) = chosen.tolist(), self._shape
        if len(ids) > top_k:
            return UserError(f"observe_layer: {len(ids)} experts, but a token has at most {top_k} in a layer")
        if wrong := [expert for expert in ids if not 0 <= expert < num_experts]:
            return UserError(f"observe_layer: expert {wrong[0]} is not one of 0..{num_experts - 1}")
        return UserError(f"observe_layer: an expert is named twice (got {ids})")

    def _checked_state(self, state: npt.ArrayLike) -> npt.NDArray[np.float32]:
        try:
            values = np.asarray(state, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"observe_layer: the hidden state is not an array of numbers ({error})") from error
        if values.shape != (self._state_size,):
            raise UserError(
                f"observe_layer: the hidden state has shape {values.shape}, not ({self._state_size},) as in training"
            )
        if not np.isfinite(values).all():
            raise UserError("observe_layer: the hidden state is not finite")
        return values


def _integers(values: npt.ArrayLike, what: str) -> npt.NDArray[np.integer[Any]]:
    """Return values as an array of integers, whatever its shape.

    Raises:
        UserError: They are not integers; ``what`` names them.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} are not an array of whole numbers ({error})") from error
    if array.dtype.kind not in "iu":
        if array.size:
            raise UserError(f"{what} are not whole numbers (got {array.dtype})")
        array = array.astype(np.int64)
    return array


class Predictor(nn.Module, ABC):
    """Base of all predictors.

    A subclass takes ``geometry`` and ``vocab_size`` first, then typed, JSON-able arguments with defaults, and keeps
    each under its own name as an attribute; that is how a predictor folder rebuilds it.

    Attributes:
        architecture: Its name in the registry.
        link: How logits become probabilities: ``"sigmoid"``, each expert by itself; ``"softmax"``, K times the
            softmax over a layer's experts, at most 1 (at the optimum of the K-positive cross-entropy the softmax is
            1/K of each expert's probability to be chosen); or ``"subset"``, the sigmoid of logits shifted so that a
            layer's add up to K. Of a model whose tokens may have fewer than K experts the first alone is true.
        calibration: What makes those probabilities true, once it was fitted.
        fitted_on: Record of its training text in its folder or checkpoint
            (`moe_beyond.predictors.training_text.Training`); None where nothing was recorded.
    """

    architecture: ClassVar[str]
    activation: Literal["sigmoid", "softmax", "subset"]

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.vocab_size = vocab_size
        self.calibration: Calibration | None = None
        self.fitted_on: Mapping[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
        """Load a fitted predictor, ready to score, whichever its architecture.

        Args:
            name: A folder, a name that `moe-beyond list` shows, or a repository of the Hugging Face Hub: ``ORG/REPO``.
            revision: Branch, tag or commit of the repository.

        Raises:
            UserError: There is no such predictor, the name means two, it is damaged, or it is none of this class.
        """
        from moe_beyond.predictors.io.folder import read_predictor  # which builds on this module

        predictor = read_predictor(find_pretrained(name, revision))
        if not isinstance(predictor, cls):
            raise UserError(f"{name}: is a {predictor.architecture}, not a {cls.__name__}")
        return predictor

    @property
    @abstractmethod
    def information(self) -> InformationSet:
        """What this instance knows, and when."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``, a slice a lookahead of `information`; arbitrary where padded."""

    @abstractmethod
    def stepper(self) -> Stepper:
        """Return a stepper in its initial state.

        Raises:
            UserError: The instance sees later tokens, so no decoding loop could feed it.
        """

    def prepare(self, text: TrainingStats) -> None:
        """Take in the training split's vocabulary before a fit; nothing by default."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits ``(..., H, L, E)`` into calibrated probabilities of being chosen."""
        logits = logits.float()
        if self.calibration is not None:
            logits = self.calibration(logits)
        return self.apply_activation(logits)

    def step_probabilities(
        self, logits: npt.NDArray[np.float32], lookaheads: npt.NDArray[np.int64], layers: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Compute the same for a stepper, in a few microseconds.

        Args:
            logits: ``(n, E)``.
            lookaheads: ``(n,)``, of each its index into H.
            layers: ``(n,)``, and its layer.
        """
        if self.calibration is None:
            shape = len(self.information.lookaheads), self.geometry.num_layers
            scale, shift = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        else:
            scale, shift = self.calibration.arrays
        return apply_activation_numba(
            logits, scale, shift, lookaheads, layers, ACTIVATIONS.index(self.activation), self.geometry.top_k
        )

    def apply_activation(self, logits: Tensor) -> Tensor:
        """Turn logits ``(..., E)`` into probabilities of being chosen, by the link alone."""
        if self.activation == "sigmoid":
            return logits.sigmoid()
        if self.activation == "subset":
            return (logits - subset_shift(logits, self.geometry.top_k)).sigmoid()
        return (logits.softmax(-1) * self.geometry.top_k).clamp(max=1.0)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments besides geometry and vocabulary size, as plain JSON-able values."""
        names = list(inspect.signature(type(self).__init__).parameters)[3:]
        return {name: getattr(self, name) for name in names}


class GradientPredictor(Predictor):
    """A predictor that is fitted by gradient descent."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the training objective, a scalar: a mean over real tokens, layers and lookaheads.

        Args:
            logits: ``(B, T, H, L, E)``, what `forward` returned.
            batch: What it was given.
            soft_targets: Of the same shape, probabilities to fit in place of what was chosen.
        """


class CountingPredictor(Predictor):
    """A predictor that is fitted by counting, in one pass over the data."""

    @abstractmethod
    def partial_fit(self, batch: Batch) -> None:
        """Count a batch."""
