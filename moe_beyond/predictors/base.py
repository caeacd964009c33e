"""Base classes of predictors: torch modules from a batch to logits, with a stepper for decoding."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation, apply_activation
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.information import InformationSet, StateKind
from moe_beyond.predictors.modules.state_projection import ProjectedStates
from moe_beyond.predictors.numba_activation import ACTIVATIONS, apply_activation_numba
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.training_stats import TrainingStats

BASE_ARGUMENTS = ("geometry", "vocab_size")
"""Constructor arguments that all predictors share, and that a predictor folder stores separately."""


class Predictor(nn.Module, ABC):
    """Base of all predictors.

    A subclass takes ``geometry`` and ``vocab_size`` first, then annotated, JSON-serialisable arguments, and keeps each
    argument in an attribute of the same name. From these a predictor folder rebuilds the instance;
    `moe_beyond.predictors.saveable.check_saveable` verifies it.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer, V.

    Attributes:
        architecture: Name of the class in the registry.
        activation: Function from logits to probabilities; see `moe_beyond.predictors.activation.Activation`.
        hidden_size: Width of the hidden states that the predictor reads, as its traces store them; None if it reads
            none.
        projected_from: Width of the model's hidden states if those of the traces are projected; otherwise None.
        calibration: Calibration of the probabilities; None if none was fitted.
        fitted_on: Training record of the predictor's folder or checkpoint
            (`moe_beyond.predictors.training_text.TrainingRecord`); None if nothing was recorded.
    """

    architecture: ClassVar[str]
    activation: Activation
    hidden_size: int | None
    projected_from: int | None

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.vocab_size = vocab_size
        self.hidden_size = self.projected_from = None
        self.calibration: Calibration | None = None
        self.fitted_on: Mapping[str, Any] | None = None

    @property
    @abstractmethod
    def information(self) -> InformationSet:
        """Everything that this instance reads, and when its scores are available."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``, one slice per lookahead of `information`; arbitrary where padded."""

    @abstractmethod
    def stepper(self) -> Stepper:
        """Return a stepper at the start of a sequence.

        Raises:
            UserError: The instance reads later tokens, which do not exist while decoding.
        """

    def prepare(self, stats: TrainingStats) -> None:
        """Read statistics of the training split before a fit; does nothing by default.

        Args:
            stats: Statistics of the training split.
        """

    def projection_of(self, kind: StateKind) -> ProjectedStates | None:
        """Return the predictor's projection of one kind of hidden states; None if it has none (default: None).

        Args:
            kind: Kind of hidden states that the predictor reads.
        """
        return None

    def weights_fault(self) -> str | None:
        """Describe stored weights that no fit can give, such as negative counts; None without a fault (default: None).

        Weights that are not finite are refused elsewhere. A module within a predictor may have this method too.
        """
        return None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return calibrated probabilities of being selected.

        Args:
            logits: Logits ``(..., H, L, E)``.
        """
        logits = logits.float()
        if self.calibration is not None:
            logits = self.calibration(logits)
        return self.apply_activation(logits)

    def step_probabilities(
        self, logits: npt.NDArray[np.float32], lookaheads: npt.NDArray[np.int64], layers: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the same as `probabilities` for a few layers of a stepper, within microseconds.

        Args:
            logits: Logits ``(n, E)``.
            lookaheads: Index into H of each row, ``(n,)``.
            layers: Layer of each row, ``(n,)``.
        """
        if self.calibration is None:
            shape = len(self.information.lookaheads), self.geometry.num_layers
            scale, shift = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        else:
            scale, shift = self.calibration.arrays
        activation = ACTIVATIONS.index(self.activation)
        return apply_activation_numba(logits, scale, shift, lookaheads, layers, activation, self.geometry.top_k)

    def apply_activation(self, logits: Tensor) -> Tensor:
        """Return uncalibrated probabilities of being selected.

        Args:
            logits: Logits ``(..., E)``.
        """
        return apply_activation(logits, self.activation, self.geometry.top_k)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments by name, without `BASE_ARGUMENTS`, as JSON-serialisable values.

        Raises:
            AttributeError: An argument has no attribute of the same name.
        """
        names = [name for name in inspect.signature(type(self)).parameters if name not in BASE_ARGUMENTS]
        return {name: getattr(self, name) for name in names}


class GradientPredictor(Predictor):
    """A predictor that is fitted by gradient descent."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the training objective, a scalar: a mean over real tokens, layers and lookaheads.

        Args:
            logits: Logits ``(B, T, H, L, E)`` that `forward` returned.
            batch: Batch that `forward` received.
            soft_targets: Probabilities of the logits' shape that replace the selected experts (default: None).
        """


class CountingPredictor(Predictor):
    """A predictor that is fitted by counting, in one pass over the data."""

    @abstractmethod
    def partial_fit(self, batch: Batch) -> None:
        """Add a batch to the counts.

        Args:
            batch: Training sequences, each passed once.
        """


def in_range(numbers: Tensor, low: int, high: int | Tensor | None = None) -> bool:
    """Return whether all numbers are within bounds, for `Predictor.weights_fault`.

    Args:
        numbers: Numbers of any shape.
        low: Smallest permitted number.
        high: Largest permitted number, broadcast to the shape (default: None, no bound).
    """
    return bool((numbers >= low).all()) and (high is None or bool((numbers <= high).all()))
