"""One pass over a trace set: metrics of the scores, and replays of what they are worth under a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.metrics import RoutingMetrics
from moe_beyond.replay import Replay, ReplaySettings, Result
from moe_beyond.traces.reader import TraceSet


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: One object a lookahead, as `RoutingMetrics.to_rows` gives them; empty without scores.
        results: One record a strategy, in the order asked for.
    """

    metrics: list[dict[str, Any]]
    results: list[Result]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"metrics": self.metrics, "results": [result.to_json() for result in self.results]}


def evaluate(
    traces: TraceSet,
    strategies: Sequence[ReplaySettings],
    split: str | None = None,
    source: ScoreSource | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Go over a trace set once; measure the scores, and replay every strategy.

    Args:
        traces: What to replay.
        strategies: How; those that prefetch name one of the source's lookaheads.
        split: One split, or all.
        source: Of the scores; only strategies without prefetch do without.
        progress: Called after each sequence with its tokens.

    Raises:
        UserError: The source does not fit the traces, a strategy does not fit the model or lacks scores, or the warm-up
            leaves nothing to count.
    """
    replays = [Replay(traces.geometry, settings) for settings in strategies]
    if source is None:
        for trace in traces.traces(split):
            for replaying in replays:
                replaying.add(trace.experts)
            progress(len(trace))
        return Evaluation([], _results(replays))
    metrics = RoutingMetrics(len(source.lookaheads), *traces.geometry.shape())
    for experts, scores in source.sequences(traces, split):
        chosen = torch.from_numpy(experts.astype(np.int64))
        targets = torch.zeros(*chosen.shape[:2], traces.geometry.num_experts, dtype=torch.bool)
        targets.scatter_(-1, chosen, True)
        metrics.update(torch.from_numpy(scores)[None], targets[None], torch.ones(1, len(chosen), dtype=torch.bool))
        for replaying in replays:
            lookahead = replaying.settings.lookahead
            replaying.add(experts, None if lookahead is None else scores[:, source.lookaheads.index(lookahead)])
        progress(len(experts))
    rows = [{**row, "causal": source.causal} for row in metrics.to_rows(source.lookaheads)]
    return Evaluation(rows, _results(replays))


def _results(replays: Sequence[Replay]) -> list[Result]:
    results = [replaying.result() for replaying in replays]
    if empty := next((result for result in results if result.accesses == 0), None):
        warmup = replays[results.index(empty)].settings.warmup_tokens
        raise UserError(f"--warmup-tokens {warmup}: no sequence is longer, so there is nothing to count")
    return results
