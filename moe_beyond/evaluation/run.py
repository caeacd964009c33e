"""Replays and evaluations from options to results: the service behind command line and Python API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.resolve import (
    SharedSettings,
    exact_budgets,
    resolve_grid,
    resolve_settings,
    resolve_strategies,
    resolve_text,
)
from moe_beyond.evaluation.results import Evaluation, Progress, Unavailable
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import with_baselines
from moe_beyond.geometry import Geometry
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile

if TYPE_CHECKING:
    from moe_beyond.predictors.training_text import MeasuredText


@dataclass(frozen=True)
class ResolvedReplay:
    """Inputs of a replay, checked and complete.

    Attributes:
        traces: Trace set to replay.
        measured_on: Split, and relation of its text to the predictors.
        strategies: Settings of each strategy, baselines included.
        sources: Sources of the scores (default: none).
        profile: Usage profile of training text (default: none).
        measure: Source of ``sources`` to measure (default: none).
        unavailable: Named strategies that cannot be replayed (default: none).
        bootstrap_draws: Number of bootstrap draws for 95 % intervals; 0 for none (default: 0).
    """

    traces: TraceSet
    measured_on: MeasuredText
    strategies: Sequence[ReplaySettings]
    sources: Sequence[ScoreSource] = ()
    profile: UsageProfile | None = None
    measure: ScoreSource | None = None
    unavailable: Sequence[Unavailable] = ()
    bootstrap_draws: int = 0

    def run(self, progress: Progress | None = None, workers: int = 1) -> ReplayOutcome:
        """Replay.

        Args:
            progress: Function that receives the finished and the total number of tokens (default: no progress).
            workers: Number of processes (default: 1).

        Raises:
            UserError: A source does not fit the traces, or the warm-up excludes every token.
        """
        evaluation = evaluate(
            self.traces,
            self.strategies,
            self.measured_on.split,
            self.sources,
            measure=self.measure,
            profile=self.profile,
            bootstrap_draws=self.bootstrap_draws,
            progress=counted(progress, self.traces, self.measured_on.split, len(self.strategies)),
            workers=workers,
        )
        return ReplayOutcome(evaluation, self)


@dataclass(frozen=True)
class ReplayOutcome:
    """Results of a replay with its inputs.

    Attributes:
        evaluation: Metrics of the scores, and one result per strategy.
        replay: Inputs of the replay.
    """

    evaluation: Evaluation
    replay: ResolvedReplay = field(repr=False)

    @property
    def results(self) -> Sequence[Result]:
        """One record per strategy, with LRU, Belady and the best static choice at every budget."""
        return self.evaluation.results

    @property
    def metrics(self) -> Sequence[LookaheadMetrics]:
        """Metrics of the predictor, one row per lookahead; empty if nothing was measured."""
        return self.evaluation.metrics

    @property
    def bootstrap_draws(self) -> int:
        """Number of bootstrap draws behind the intervals; 0 without intervals."""
        return self.evaluation.bootstrap_draws

    @property
    def measured_on(self) -> MeasuredText:
        """Split, and relation of its text to the training text of the predictors."""
        return self.replay.measured_on

    @property
    def unavailable(self) -> Sequence[Unavailable]:
        """Named strategies that cannot be replayed."""
        return self.replay.unavailable

    @property
    def geometry(self) -> Geometry:
        """Geometry of the model."""
        return self.replay.traces.geometry

    @property
    def title(self) -> str:
        """Name of the model, and source of the traces."""
        return f"{self.geometry.model}, {self.replay.traces.manifest.source}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        content: dict[str, Any] = {"measured_on": self.measured_on.to_json(), **self.evaluation.to_json()}
        if self.replay.measure is None:
            del content["metrics"]
        if self.unavailable:
            content["unavailable"] = [each.to_json() for each in self.unavailable]
        return content


def resolve_replay(
    options: ReplayOptions, traces: TraceSet, source: ScoreSource | None = None, *, split: str | None = None
) -> ResolvedReplay:
    """Resolve the options of a replay, and add the baselines.

    Args:
        options: Options of the replay.
        traces: Trace set to replay.
        source: Source of scores (default: none).
        split: Name of a split, or ``all`` (default: all; with a predictor, one that it was not fitted on, if any).

    Raises:
        UserError: An option cannot be read or excludes another, or the source does not fit.
    """
    shared = resolve_settings(options, traces)
    strategies = resolve_strategies(options, traces, shared, source)
    return ResolvedReplay(
        traces,
        resolve_text(traces, split, shared, strategies.sources),
        exact_budgets(
            with_baselines(strategies.settings, shared.common, traces.geometry, shared.quotas), options, traces
        ),
        strategies.sources,
        shared.profile,
        unavailable=strategies.unavailable,
    )


def resolve_evaluation(
    options: ReplayOptions,
    traces: TraceSet,
    source: ScoreSource,
    *,
    split: str | None = None,
    bootstrap_draws: int = 0,
) -> ResolvedReplay:
    """Resolve the options of an evaluation: metrics of one source, and its replay by every lookahead.

    Prefetchers that select by one lookahead are replayed at each but ``next``, unless the options name lookaheads.

    Args:
        options: Options of the replay.
        traces: Trace set to replay.
        source: Source of scores.
        split: Name of a split, or ``all`` (default: one that the predictor was not fitted on, if any).
        bootstrap_draws: Number of bootstrap draws for 95 % intervals; 0 for none (default: 0).

    Raises:
        UserError: An option cannot be read or excludes another, or the source does not fit.
    """
    shared = resolve_settings(options, traces)
    text = resolve_text(traces, split, shared, [source])
    lookaheads = [lookahead for lookahead in source.lookaheads if lookahead != "next"]
    settings = resolve_grid(options, traces, shared, source, lookaheads)
    replay = measured_replay(traces, text, settings, source, shared, bootstrap_draws)
    return replace(replay, strategies=exact_budgets(replay.strategies, options, traces))


def measured_replay(
    traces: TraceSet,
    text: MeasuredText,
    settings: Sequence[ReplaySettings],
    source: ScoreSource,
    shared: SharedSettings,
    bootstrap_draws: int = 0,
) -> ResolvedReplay:
    """Make the inputs of an evaluation of one source, and add the baselines.

    Args:
        traces: Trace set to replay.
        text: Split, and relation of its text to the predictors.
        settings: Settings of each strategy, without baselines.
        source: Source of scores to measure.
        shared: Settings that all strategies share.
        bootstrap_draws: Number of bootstrap draws; 0 for none (default: 0).
    """
    strategies = with_baselines(settings, shared.common, traces.geometry, shared.quotas)
    return ResolvedReplay(traces, text, strategies, [source], shared.profile, source, bootstrap_draws=bootstrap_draws)


def run_replay(
    options: ReplayOptions,
    traces: TraceSet,
    source: ScoreSource | None = None,
    *,
    split: str | None = None,
    progress: Progress | None = None,
    workers: int = 1,
) -> ReplayOutcome:
    """Replay traces: `resolve_replay`, then run.

    Args:
        options: Options of the replay.
        traces: Trace set to replay.
        source: Source of scores (default: none).
        split: Name of a split, or ``all`` (default: all; with a predictor, one that it was not fitted on, if any).
        progress: Function that receives the finished and the total number of tokens (default: no progress).
        workers: Number of processes (default: 1).

    Raises:
        UserError: An option cannot be read or excludes another, or the source does not fit.
    """
    return resolve_replay(options, traces, source, split=split).run(progress, workers)


def run_evaluation(
    options: ReplayOptions,
    traces: TraceSet,
    source: ScoreSource,
    *,
    split: str | None = None,
    bootstrap_draws: int = 0,
    progress: Progress | None = None,
    workers: int = 1,
) -> ReplayOutcome:
    """Measure a source of scores and replay it: `resolve_evaluation`, then run.

    Args:
        options: Options of the replay.
        traces: Trace set to replay.
        source: Source of scores.
        split: Name of a split, or ``all`` (default: one that the predictor was not fitted on, if any).
        bootstrap_draws: Number of bootstrap draws for 95 % intervals; 0 for none (default: 0).
        progress: Function that receives the finished and the total number of tokens (default: no progress).
        workers: Number of processes (default: 1).

    Raises:
        UserError: An option cannot be read or excludes another, or the source does not fit.
    """
    return resolve_evaluation(options, traces, source, split=split, bootstrap_draws=bootstrap_draws).run(
        progress, workers
    )


def counted(progress: Progress | None, traces: TraceSet, split: str | None, strategies: int) -> Callable[[int], object]:
    """Turn a function of finished and total tokens into one that receives the tokens of each strategy's block.

    Args:
        progress: Function that receives the finished and the total number of tokens; None for no progress.
        traces: Trace set to replay.
        split: Name of a split; None for all splits.
        strategies: Number of strategies.
    """
    if progress is None:
        return lambda tokens: None
    report, done = progress, 0
    total = sum(shard.tokens for shard in traces.shards(split)) * strategies

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        report(done, total)

    return advance
