"""A predictor whose scores come at two moments: once a layer is routed, and once it is computed."""

import numpy as np
import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.layer_mlp import LayerMlp
from moe_beyond.predictors.architectures.pre_attention import PreAttention
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.training_stats import TrainingStats


class TwoMoments(Predictor):
    """Scores of the next layer: `PreAttention` gives those that wait for computing, and `LayerMlp` the others."""

    architecture = "two_moments"
    activation = "sigmoid"

    def __init__(self, geometry: Geometry, vocab_size: int, hidden_size: int, width: int = 8) -> None:
        super().__init__(geometry, vocab_size)
        self.hidden_size, self.width = hidden_size, width
        self.late = PreAttention(geometry, vocab_size, hidden_size, width)
        self.early = LayerMlp(geometry, vocab_size, hidden_size, 1, width)

    @property
    def information(self) -> InformationSet:
        return InformationSet(("computed", 1), token_ids=False, hidden_states=("router_inputs", "layer_inputs"))

    def prepare(self, stats: TrainingStats) -> None:
        self.late.prepare(stats)
        self.early.prepare(stats)

    def forward(self, batch: Batch) -> Tensor:
        return torch.cat([self.late(batch), self.early(batch)], 2)

    def stepper(self) -> Stepper:
        return _TwoMomentsStepper(self)


class _TwoMomentsStepper(Stepper):
    _predictor: TwoMoments

    def _reset(self) -> None:
        self._scores = np.full(self._shape[:2], np.nan, np.float32)

    def _start_token(self, token_id: int) -> None:
        self._reset()
        self._set(0, 0, self._predictor.late.first)

    def _route(self, layer: int, experts: np.ndarray, state: np.ndarray | None) -> None:
        self._scores = self._scores.copy()
        self._scores[layer] = np.nan
        self._predict(1, self._predictor.early, layer, state)

    def _compute(self, layer: int, state: np.ndarray | None) -> None:
        self._scores = self._scores.copy()
        self._predict(0, self._predictor.late, layer, state)

    @torch.inference_mode()
    def _predict(self, index: int, part: LayerMlp | PreAttention, layer: int, state: np.ndarray | None) -> None:
        if state is not None and layer + 1 < len(self._scores):
            states = torch.from_numpy(state)[None, None]
            self._set(index, layer + 1, part.logits_from_states(states, 1, slice(layer + 1, layer + 2))[0])

    def _set(self, index: int, layer: int, logits: Tensor) -> None:
        places = np.array([index], np.int64), np.array([layer], np.int64)
        self._scores[layer] = self._predictor.step_probabilities(logits.detach().numpy(), *places)[0]

    def scores(self) -> np.ndarray:
        return self._scores
