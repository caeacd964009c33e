"""The pictures of a replay."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.report.plots.replay import budgets_figure, frontier_figure, layers_figure, save, timeline_figure
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.simulator.timeline import Timeline, timeline
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile

TIMELINE_TOKEN = 12
"""Which token of the first long enough sequence a timeline shows: the cache is warm by then."""


def pictures(
    traces: TraceSet,
    strategies: Sequence[ReplaySettings],
    results: Sequence[Result],
    sources: Sequence[ScoreSource],
    profile: UsageProfile | None,
    split: str | None,
) -> dict[str, Figure]:
    """Draw what there is to draw: curves over budgets, the frontier, the layers, and on a device one token in time.

    Args:
        traces: What was replayed.
        strategies: How; the first one's token is drawn in time.
        results: What came of it.
        sources: Of the scores.
        profile: What is known of training text.
        split: Of the traces.

    Returns:
        Name -> figure.
    """
    geometry, title = traces.geometry, f"{traces.geometry.model}, {traces.manifest.source}"
    drawn = {}
    if len({result.budget_slots for result in results if result.policy != "all_resident"}) > 1:
        drawn["budgets"] = budgets_figure(results, title)
    drawn |= {"frontier": frontier_figure(results, title), "layers": layers_figure(results, geometry, title)}
    settings = strategies[0]
    if (found := _one_token(traces, settings, sources, profile, split)) is not None:
        assert settings.device is not None
        what = f"{settings.strategy}, {settings.slots} slots, {settings.device.name}: token {found.token}"
        drawn["timeline"] = timeline_figure(found, geometry, what)
    return drawn


def write_pictures(folder: str | Path, drawn: dict[str, Figure]) -> list[Path]:
    """Write figures as PNG into a folder, which is made if it is not there; return the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(written, drawn.values(), strict=True):
        save(figure, path)
    return written


def _one_token(
    traces: TraceSet,
    settings: ReplaySettings,
    sources: Sequence[ScoreSource],
    profile: UsageProfile | None,
    split: str | None,
) -> Timeline | None:
    """Time a token, where there is a device and every token is a step."""
    plain = settings.batch_size == 1 and settings.window == 1 and not settings.prefill_chunk and not settings.carry_over
    if settings.device is None or not plain or settings.policy == "od_moe":
        return None
    for sequence in _sequences(traces, settings, sources, split):
        if len(sequence) > TIMELINE_TOKEN:
            return timeline(traces.geometry, settings, sequence, TIMELINE_TOKEN, profile)
    return None


def _sequences(
    traces: TraceSet, settings: ReplaySettings, sources: Sequence[ScoreSource], split: str | None
) -> Iterator[ReplaySequence]:
    source = next((source for source in sources if source.name == settings.predictor), None)
    if source is None:
        return (ReplaySequence(traces.geometry, trace.experts) for trace in traces.traces(split))
    return (ReplaySequence(traces.geometry, t.experts, scores) for t, scores in source.sequences(traces, split, True))
