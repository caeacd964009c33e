"""What every predictor is: a torch module from a batch to scores, and a stepper for decoding."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.information import Information
from moe_beyond.predictors.link import LINKS, link_now
from moe_beyond.predictors.loss import subset_shift
from moe_beyond.published import find_pretrained
from moe_beyond.traces.routers import Routers
from moe_beyond.traces.schema import none_id


@dataclass(frozen=True)
class TrainingText:
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

    Call order for a token: `observe_token`, then `observe_layer` for l = 0 .. L-1; `scores` at any time between.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget the sequence."""

    @abstractmethod
    def observe_token(self, token_id: int) -> None:
        """Start a token: its id is known, none of its layers is routed."""

    @abstractmethod
    def observe_layer(self, layer: int, experts: npt.ArrayLike, state: npt.ArrayLike | None = None) -> None:
        """Learn which experts, K of them or fewer, ``layer`` of the current token was routed to.

        Args:
            layer: MoE layer, counted from 0.
            experts: Their ids, in any order.
            state: ``(D,)``, for predictors whose information set has hidden states: what the layer's router read; or,
                where those are layer inputs, what the next MoE layer reads before its attention, None after the last.
        """

    @abstractmethod
    def scores(self) -> npt.NDArray[np.float32]:
        """Return ``(L, E)`` float32 probabilities of what is known of each layer's next run, NaN for nothing.

        Where several lookaheads reach a layer, the score is that of the smallest. The next run of a layer that is
        routed is that by the next token, of which only lookahead ``"next"`` knows.
        """

    def observe_tokens(self, token_ids: npt.ArrayLike, experts: npt.ArrayLike) -> None:
        """Take in a prefix at once: ``(T,)`` token ids and ``(T, L, K)`` experts.

        No hidden states of it: what reads some reads those of the present token alone.
        """
        for token_id, layers in zip(np.asarray(token_ids), np.asarray(experts), strict=True):
            self.observe_token(int(token_id))
            for layer, chosen in enumerate(layers):
                self.observe_layer(layer, chosen[chosen != none_id(chosen.dtype)])


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
    """

    architecture: ClassVar[str]
    link: Literal["sigmoid", "softmax", "subset"]

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.vocab_size = vocab_size
        self.calibration: Calibration | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
        """Load a fitted predictor, ready to score, whichever its architecture.

        Args:
            name: A folder, a name that `moe-beyond list` shows, or a repository of the Hugging Face Hub: ``ORG/REPO``.
            revision: Branch, tag or commit of the repository.

        Raises:
            UserError: There is no such predictor, the name means two, it is damaged, or it is none of this class.
        """
        from moe_beyond.predictors.folder import load_predictor  # which builds on this module

        predictor = load_predictor(find_pretrained(name, revision))
        if not isinstance(predictor, cls):
            raise UserError(f"{name}: is a {predictor.architecture}, not a {cls.__name__}")
        return predictor

    @property
    @abstractmethod
    def information(self) -> Information:
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

    def prepare(self, text: TrainingText) -> None:
        """Take in the training split's vocabulary before a fit; nothing by default."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits ``(..., H, L, E)`` into calibrated probabilities of being chosen."""
        logits = logits.float()
        if self.calibration is not None:
            logits = self.calibration(logits)
        return self.linked(logits)

    def probabilities_now(
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
        return link_now(logits, scale, shift, lookaheads, layers, LINKS.index(self.link), self.geometry.top_k)

    def linked(self, logits: Tensor) -> Tensor:
        """Turn logits ``(..., E)`` into probabilities of being chosen, by the link alone."""
        if self.link == "sigmoid":
            return logits.sigmoid()
        if self.link == "subset":
            return (logits - subset_shift(logits, self.geometry.top_k)).sigmoid()
        return (logits.softmax(-1) * self.geometry.top_k).clamp(max=1.0)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments besides geometry and vocabulary size, as plain JSON-able values."""
        names = list(inspect.signature(type(self).__init__).parameters)[3:]
        return {name: getattr(self, name) for name in names}


class GradientPredictor(Predictor):
    """A predictor that is fitted by gradient descent."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """Return the training objective, a scalar: a mean over real tokens, layers and lookaheads.

        Args:
            logits: ``(B, T, H, L, E)``, what `forward` returned.
            batch: What it was given.
            wanted: Of the same shape, probabilities to fit in place of what was chosen.
        """


class CountingPredictor(Predictor):
    """A predictor that is fitted by counting, in one pass over the data."""

    @abstractmethod
    def observe(self, batch: Batch) -> None:
        """Count a batch."""
