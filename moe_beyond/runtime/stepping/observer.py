"""The moments at which a predictor observes the layers of a forward."""

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.runtime.stepping.scorer import SequenceScorer
from moe_beyond.runtime.strategy import RunStrategy

if TYPE_CHECKING:
    from moe_beyond.predictors.information import InformationSet, StateKind

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]


class Observed(NamedTuple):
    """A layer that the predictor has observed.

    Attributes:
        layer: Position of the layer among the MoE layers.
        scores: Scores ``(L, E)`` of each layer's next run; None without scores.
        seconds: Seconds of stepping the predictor.
        computed: Whether the layer is observed as computed, and not as routed (default: False).
    """

    layer: int
    scores: Scores | None
    seconds: float
    computed: bool = False


class Observer:
    """Lets a predictor observe each layer when it is routed and, if the predictor needs it, when it is computed.

    A predictor that reads layer inputs observes a layer as computed when the next one receives its input. So it never
    observes the last layer of a step as computed.

    Args:
        scorer: Scores of a predictor (default: None).
        information: Information set of the predictor (default: it reads no hidden states, and no score waits for
            computing).

    Attributes:
        scored: Whether the step has scores.
    """

    def __init__(self, scorer: SequenceScorer | None = None, information: "InformationSet | None" = None) -> None:
        self._scorer = scorer
        self._reads_layer_inputs = information is not None and "layer_inputs" in information.hidden_states
        scores_follow = information is not None and "computed" in information.lookaheads
        self._observes_computing = scores_follow or self._reads_layer_inputs
        self._state: Half | None = None  # input of the next layer's router
        self._computed: int | None = None  # a computed layer that is not observed as computed
        self.scored = False

    @property
    def has_predictor(self) -> bool:
        """Whether there is a predictor."""
        return self._scorer is not None

    def start(self, token_ids: Ints | None, past: int) -> Scores | None:
        """Begin a forward, as `SequenceScorer.start` does; return the scores ``(L, E)`` at its start.

        Raises:
            UserError: A token id is not in the predictor's vocabulary.
        """
        self._computed = None
        scores = None if self._scorer is None else self._scorer.start(token_ids, past)
        self.scored = scores is not None
        return scores

    def routed(self, layer: int, routed: Ints) -> Observed | None:
        """Observe that a layer is routed.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts, ``(N, K)``.
        """
        if self._scorer is None:
            return None
        state, self._state = self._state, None
        began = time.perf_counter()
        scores = self._scorer.routed(layer, routed, state)
        return Observed(layer, scores, time.perf_counter() - began)

    def computed(self, layer: int) -> Observed | None:
        """Note that a layer has computed; observe it as computed unless its state is to come.

        Args:
            layer: Position of the layer among the MoE layers.
        """
        if self._scorer is None or not self._observes_computing:
            return None
        if self.scored and self._reads_layer_inputs:  # states matter only for scores, and a chunk's are not seen
            self._computed = layer
            return None
        return self._observe_computed(layer, None)

    def take_state(self, kind: "StateKind", layer: int, state: Half) -> Observed | None:
        """Take a hidden state of a single token that the predictor reads.

        Args:
            kind: Kind of the state.
            layer: Layer whose router, or whose whole layer, reads the state.
            state: Hidden state, ``(D,)``.
        """
        if kind == "router_inputs":
            self._state = state
        elif self._computed is not None and self._computed < layer:
            computed, self._computed = self._computed, None
            return self._observe_computed(computed, state)
        return None

    def end(self) -> None:
        """Observe the last tokens of a run, for online updates."""
        if self._scorer is not None:
            self._scorer.end()

    def forget(self) -> None:
        """Forget the layer and the state of an interrupted event."""
        self._computed = self._state = None

    def _observe_computed(self, layer: int, state: Half | None) -> Observed:
        assert self._scorer is not None, "computed layers are observed by a predictor"
        began = time.perf_counter()
        scores = self._scorer.computed(layer, state)
        return Observed(layer, scores, time.perf_counter() - began, computed=True)


def make_observer(strategy: RunStrategy) -> Observer:
    """Make the observer of a strategy, with or without a predictor.

    Args:
        strategy: Strategy of the run, or of a predictor that does not act.
    """
    if strategy.predictor is None:
        return Observer()
    return Observer(SequenceScorer(strategy.predictor, strategy.online), strategy.predictor.information)
