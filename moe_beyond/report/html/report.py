"""From a predictor and traces to a page: measure, replay over budgets and on devices, and write."""

from collections.abc import Sequence
from pathlib import Path

from moe_beyond.evaluation.resolve import SharedSettings, resolve_text
from moe_beyond.evaluation.results import Progress
from moe_beyond.evaluation.run import ReplayOutcome, ResolvedReplay
from moe_beyond.evaluation.sources import from_predictor_folder, load_profile, pretrained_for
from moe_beyond.geometry import budget_slots
from moe_beyond.report.html.build import write_page
from moe_beyond.report.html.strategies import DEFAULT_DEVICES, default_slots, page_strategies
from moe_beyond.report.html.subject import find_subject
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet


def write_report(
    path: str | Path,
    predictor: str,
    traces: TraceSet,
    *,
    split: str | None = None,
    budgets: Sequence[str] = (),
    devices: Sequence[str] = (),
    warmup_tokens: int = 0,
    progress: Progress | None = None,
) -> ReplayOutcome:
    """Measure and replay a predictor, and write its page.

    Args:
        path: HTML file to write.
        predictor: Folder of a run, a predictor folder, or the name of a pretrained predictor.
        traces: Trace set to measure.
        split: Name of a split, or ``all`` (default: one that the predictor was not fitted on, if any).
        budgets: Memory budgets (default: those of `default_slots`).
        devices: Device presets or JSON files (default: `DEFAULT_DEVICES`).
        warmup_tokens: Tokens at the start of each sequence that replays do not count (default: 0).
        progress: Function that receives the finished and the total number of tokens (default: no progress).

    Raises:
        UserError: There is no such predictor, it does not fit the traces, or a budget or a device cannot be read.
    """
    subject = find_subject(predictor)
    geometry, bits = traces.geometry, traces.manifest.bits
    loaded = [load_device(device) for device in dict.fromkeys(devices or DEFAULT_DEVICES)]
    slots = [budget_slots(budget, geometry, bits) for budget in budgets] or default_slots(geometry)
    source = from_predictor_folder(subject.folder)
    common = ReplaySettings(geometry.total_experts, warmup_tokens=warmup_tokens, bits=bits)
    history = pretrained_for("history", traces)
    outcome = ResolvedReplay(
        traces,
        resolve_text(traces, split, SharedSettings(common), [source]),
        page_strategies(common, slots, source, geometry, loaded),
        [source],
        profile=None if history is None else load_profile(history, traces.manifest, traces.folder),
        measure=source,
    ).run(progress)
    write_page(
        path,
        subject,
        traces,
        outcome.measured_on.split,
        outcome.evaluation,
        notes=outcome.measured_on.lines,
        source=source,
        devices=loaded,
        bits=bits,
        warmup_tokens=warmup_tokens,
        profile=None if history is None else history.name,
    )
    return outcome
