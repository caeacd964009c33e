"""The moments at which a predictor observes the layers of a forward."""

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.runtime.stepping.scorer import SequenceScorer
from moe_beyond.runtime.strategy import RunStrategy

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]


class Observed(NamedTuple):
    """A layer that the predictor has observed.

    Attributes:
        layer: Position of the layer among the MoE layers.
        scores: Scores ``(L, E)`` of each layer's next run; None without scores.
        seconds: Seconds of stepping the predictor.
    """

    layer: int
    scores: Scores | None
    seconds: float


class Observer:
    """Lets a predictor observe each layer when it is routed, or after it has computed.

    In the second case the predictor reads the state after the layer. So it observes a layer when the next one receives
    its input, and the last layer of a step when the next step begins.

    Args:
        scorer: Scores of a predictor (default: None).
        after_computing: Whether scores follow a layer's computing, instead of its routing (default: False).

    Attributes:
        after_computing: Whether scores follow a layer's computing.
        scored: Whether the step has scores.
    """

    def __init__(self, scorer: SequenceScorer | None = None, *, after_computing: bool = False) -> None:
        self._scorer, self.after_computing = scorer, after_computing
        self._state: Half | None = None
        self._waiting: tuple[int, Ints] | None = None  # a computed layer that is not observed
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
        scores = None if self._scorer is None else self._scorer.start(token_ids, past)
        self.scored = scores is not None
        return scores

    def routed(self, layer: int, routed: Ints) -> Observed | None:
        """Observe a layer if scores follow its routing.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts, ``(N, K)``.
        """
        if self._scorer is None or self.after_computing:
            return None
        state, self._state = self._state, None
        return self._observe(layer, routed, state)

    def computed(self, layer: int, routed: Ints) -> Observed | None:
        """Note that a layer has computed; observe it if its scores wait for no state.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts, ``(N, K)``.
        """
        if not self.after_computing:
            return None
        self._waiting = (layer, routed)
        return None if self.scored else self.finish()  # states matter only for scores, and a chunk's are not seen

    def take_state(self, layer: int, state: Half) -> Observed | None:
        """Take the hidden state of a single token that the predictor reads.

        Args:
            layer: Layer whose router, or whose whole layer, reads the state.
            state: Hidden state, ``(D,)``.
        """
        if not self.after_computing:
            self._state = state
        elif self._waiting is not None and self._waiting[0] < layer:
            return self.finish(state)
        return None

    def finish(self, state: Half | None = None) -> Observed | None:
        """Observe the computed layer that is not observed.

        Args:
            state: Hidden state after the layer (default: None, as after the last layer of a step).
        """
        if self._waiting is None:
            return None
        (layer, routed), self._waiting = self._waiting, None
        return self._observe(layer, routed, state)

    def end(self) -> None:
        """Observe the last layers and tokens of a run, for online updates."""
        self.finish()
        if self._scorer is not None:
            self._scorer.end()

    def forget(self) -> None:
        """Forget the layer and the state of an interrupted event."""
        self._waiting = self._state = None

    def _observe(self, layer: int, routed: Ints, state: Half | None) -> Observed:
        assert self._scorer is not None, "scores after computing need a predictor"
        began = time.perf_counter()
        scores = self._scorer.routed(layer, routed, state)
        return Observed(layer, scores, time.perf_counter() - began)


def make_observer(strategy: RunStrategy) -> Observer:
    """Make the observer of a strategy, with or without a predictor.

    Args:
        strategy: Strategy of the run, or of a predictor that does not act.
    """
    if strategy.predictor is None:
        return Observer()
    return Observer(
        SequenceScorer(strategy.predictor, strategy.online),
        after_computing=strategy.settings.available_after == "computed",
    )
