"""Records that evaluations return, without a library for training or pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.simulator import Result

Progress = Callable[[int, int], object]
"""Function that receives the finished and the total number of tokens, counted once per strategy."""


@dataclass(frozen=True)
class Unavailable:
    """A strategy that cannot be replayed.

    Attributes:
        strategy: Name of the strategy.
        reason: Reason in one sentence.
    """

    strategy: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Return plain values."""
        return {"strategy": self.strategy, "reason": self.reason}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of scores, and results of strategies.

    Attributes:
        metrics: One row per lookahead; empty if no scores were measured.
        results: One record per strategy, in the order of the strategies.
        bootstrap_draws: Number of bootstrap draws behind the intervals of both; 0 without intervals (default: 0).
    """

    metrics: list[LookaheadMetrics]
    results: list[Result]
    bootstrap_draws: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        bootstrap_draws = {"bootstrap_draws": self.bootstrap_draws} if self.bootstrap_draws else {}
        return {
            "metrics": [row.to_json() for row in self.metrics],
            "results": [result.to_json() for result in self.results],
            **bootstrap_draws,
        }


@dataclass(frozen=True)
class CheckpointEvaluation:
    """Evaluation of one checkpoint of a run.

    Attributes:
        checkpoint: File name of the checkpoint.
        epoch: Epoch in which it was saved, from 0.
        step: Optimizer steps before it was saved.
        evaluation: Metrics and results.
    """

    checkpoint: str
    epoch: int
    step: int
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"checkpoint": self.checkpoint, "epoch": self.epoch, "step": self.step, **self.evaluation.to_json()}
