"""The pictures of a replay, as files in a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.profile import Profile
from moe_beyond.replay import ReplaySettings, Result
from moe_beyond.replay.sequence import Sequence as Steppable
from moe_beyond.replay.timeline import Timeline, timeline
from moe_beyond.report.plots import plot_budgets, plot_frontier, plot_layers, plot_timeline
from moe_beyond.traces.reader import TraceSet

TIMELINE_TOKEN = 12
"""Which token of the first long enough sequence a timeline shows: the cache is warm by then."""


def write_pictures(
    folder: str | Path,
    traces: TraceSet,
    strategies: Sequence[ReplaySettings],
    results: Sequence[Result],
    sources: Sequence[ScoreSource],
    profile: Profile | None,
    split: str | None,
) -> list[Path]:
    """Draw what there is to draw: curves over budgets, the frontier, the layers, and on a device one token in time.

    Args:
        folder: Where to; made if it is not there.
        traces: What was replayed.
        strategies: How; the first one's token is drawn in time.
        results: What came of it.
        sources: Of the scores.
        profile: What is known of training text.
        split: Of the traces.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    geometry, title = traces.geometry, f"{traces.manifest.geometry.model}, {traces.manifest.source}"
    written = []
    if len({result.budget_slots for result in results if result.policy != "all_resident"}) > 1:
        written.append(folder / "budgets.png")
        plot_budgets(results, written[-1], title)
    written.append(folder / "frontier.png")
    plot_frontier(results, written[-1], title)
    written.append(folder / "layers.png")
    plot_layers(results, geometry, written[-1], title)
    settings = strategies[0]
    if (found := _one_token(traces, settings, sources, profile, split)) is not None:
        written.append(folder / "timeline.png")
        assert settings.device is not None
        what = f"{settings.strategy}, {settings.slots} slots, {settings.device.name}: token {found.token}"
        plot_timeline(found, geometry, written[-1], what)
    return written


def _one_token(
    traces: TraceSet,
    settings: ReplaySettings,
    sources: Sequence[ScoreSource],
    profile: Profile | None,
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
) -> Iterator[Steppable]:
    source = next((source for source in sources if source.name == settings.predictor), None)
    if source is None:
        return (Steppable(traces.geometry, trace.experts) for trace in traces.traces(split))
    return (Steppable(traces.geometry, t.experts, scores) for t, scores in source.sequences(traces, split, True))
