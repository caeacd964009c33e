"""Choosing the plots of a replay, and writing plots to files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from moe_beyond.report.plots.replay import budgets_plot, frontier_plot, layers_plot, save_png, timeline_plot
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.simulator.timeline import Timeline, timeline
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile

if TYPE_CHECKING:
    from moe_beyond.evaluation.sources import ScoreSource

TIMELINE_TOKEN = 12
"""Token that a timeline shows, of the first sequence that is longer; the cache is warm by then."""


def replay_plots(
    traces: TraceSet,
    strategies: Sequence[ReplaySettings],
    results: Sequence[Result],
    sources: Sequence["ScoreSource"],
    profile: UsageProfile | None,
    split: str | None,
) -> dict[str, Figure]:
    """Draw the plots of a replay.

    Args:
        traces: Replayed trace set.
        strategies: Replayed strategies; the timeline shows the first.
        results: Results of the strategies.
        sources: Sources of the scores.
        profile: Usage profile of training text; None if there is none.
        split: Replayed split; None for all.

    Returns:
        Name -> plot: ``frontier`` and ``layers``; ``budgets`` for several budgets; ``timeline`` on a device.
    """
    geometry, title = traces.geometry, f"{traces.geometry.model}, {traces.manifest.source}"
    plots = {}
    if len({result.budget_slots for result in results if result.policy != "all_resident"}) > 1:
        plots["budgets"] = budgets_plot(results, title)
    plots |= {"frontier": frontier_plot(results, title), "layers": layers_plot(results, geometry, title)}
    settings = strategies[0]
    if (token := _token_timeline(traces, settings, sources, profile, split)) is not None:
        assert settings.device is not None
        title = f"{settings.strategy}, {settings.slots:,} slots, {settings.device.name}: token {token.token}"
        plots["timeline"] = timeline_plot(token, geometry, title)
    return plots


def write_plots(folder: str | Path, plots: dict[str, Figure]) -> list[Path]:
    """Write plots as ``NAME.png`` into a folder, which is created if necessary; return the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in plots]
    for path, plot in zip(paths, plots.values(), strict=True):
        save_png(plot, path)
    return paths


def _token_timeline(
    traces: TraceSet,
    settings: ReplaySettings,
    sources: Sequence["ScoreSource"],
    profile: UsageProfile | None,
    split: str | None,
) -> Timeline | None:
    """Return the timeline of one token; None without a device, or if a step has several tokens."""
    single = settings.batch_size == 1 and settings.window == 1 and not settings.prefill_chunk
    if settings.device is None or not single or settings.carry_over or settings.policy == "od_moe":
        return None
    for sequence in _sequences(traces, settings, sources, split):
        if len(sequence) > TIMELINE_TOKEN:
            return timeline(traces.geometry, settings, sequence, TIMELINE_TOKEN, profile)
    return None


def _sequences(
    traces: TraceSet, settings: ReplaySettings, sources: Sequence["ScoreSource"], split: str | None
) -> Iterator[ReplaySequence]:
    source = next((source for source in sources if source.name == settings.predictor), None)
    if source is None:
        return (ReplaySequence(traces.geometry, trace.experts) for trace in traces.traces(split))
    return (ReplaySequence(traces.geometry, t.experts, scores) for t, scores in source.sequences(traces, split, True))
