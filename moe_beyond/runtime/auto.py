"""``moe-beyond run --auto``: a strategy that is tuned on recorded conversations, before or at the start of a run."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from moe_beyond.collect.prompts import Prompt
from moe_beyond.errors import UserError
from moe_beyond.evaluation.checkpoints import find_source
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.tuning import TuningReport, run_tuning
from moe_beyond.runtime.session import SessionOptions, SessionResult, run_session
from moe_beyond.traces.reader import TraceSet

RECORDED_PROMPTS = 8
"""Number of prompts that are recorded if the user has no recording: four to choose by, and four to judge by."""


@dataclass(frozen=True)
class AutoOptions:
    """Options of an automatic choice.

    Attributes:
        traces: Recording of the user; None to record the first prompts.
        device: Device of the timing model: a preset or a JSON file.
    """

    traces: str | None
    device: str


def run_auto(
    options: SessionOptions,
    auto: AutoOptions,
    texts: Sequence[Prompt] | Iterator[str],
    stream: IO[str] = sys.stdout,
    notify: Callable[[str], None] = lambda line: None,
    refuse: Callable[[UserError], None] = lambda error: None,
) -> SessionResult | None:
    """Choose a strategy, and run a session with it.

    Without a recording, a first session generates the first `RECORDED_PROMPTS` prompts with LRU and records them. The
    other prompts are a second session, which starts with an empty cache.

    Args:
        options: Options of the session; the strategy in ``loading`` is replaced.
        auto: Options of the choice.
        texts: Prompts; or an iterator of a user's messages in one conversation.
        stream: Destination of the text.
        notify: Function of a line that a user should read before the text.
        refuse: Function of the error of a message that is too long or no text.

    Returns:
        Results of the session with the chosen strategy; None if no text was generated.

    Raises:
        UserError: The recording belongs to another model or is too short, there are too few prompts to record, or the
            session fails.
    """
    if auto.traces is not None:
        tuned, lines = _tuned(options, TraceSet(auto.traces), auto.device)
        for line in lines:
            notify(line)
        return _with_choice(run_session(tuned, texts, stream, notify, refuse), lines)
    if isinstance(texts, Iterator) or len(texts) <= RECORDED_PROMPTS:
        raise UserError(
            f"--auto: records the first {RECORDED_PROMPTS} prompts, so it needs --prompts with more; give more, or a "
            "recording of run --trace: --auto DIR"
        )
    if options.check:
        raise UserError("--check: --auto without a recording runs two sessions; give --auto DIR, or leave one out")
    with TemporaryDirectory() as folder:
        recorded = Path(folder) / "recorded"
        loading = {**options.loading, "policy": "lru", "prefetch": None, "lookahead": None, "predictor": None}
        first = replace(options, loading=loading, trace=recorded)
        notify(f"auto: the first {RECORDED_PROMPTS} prompts run with lru and are recorded")
        run_session(first, texts[:RECORDED_PROMPTS], stream, notify)
        tuned, lines = _tuned(options, TraceSet(str(recorded)), auto.device)
    lines = [f"auto: recorded {RECORDED_PROMPTS} prompts with lru; the table has the other prompts", *lines]
    for line in lines[1:]:
        notify(line)
    return _with_choice(run_session(tuned, texts[RECORDED_PROMPTS:], stream, notify), lines)


def _tuned(options: SessionOptions, traces: TraceSet, device: str) -> tuple[SessionOptions, list[str]]:
    """Choose a strategy for the steps of a run: a warm cache, and each prompt in one step."""
    loading = options.loading
    predictor = None if loading["predictor"] is None else str(loading["predictor"])
    longest = max((trace.decode_start for trace in traces), default=0)
    report: TuningReport = run_tuning(
        ReplayOptions(
            budget=(str(loading["budget"]),), device=device, profile=loading["profile"], carry_over=True,
            prefill_chunk=longest,
        ),
        traces, None if predictor is None else find_source(predictor), aim="tokens", predictor=predictor,
    )  # fmt: skip
    choice = report.choice
    chosen = {
        "policy": choice.policy, "prefetch": choice.prefetch, "lookahead": choice.lookahead, "scope": choice.scope,
        "predictor": choice.predictor,
    }  # fmt: skip
    lines = [f"auto: {line}" for line in (f"{report.halves}, on {device}", *report.sentences)]
    return replace(options, loading={**loading, **chosen}), lines


def _with_choice(session: SessionResult | None, lines: list[str]) -> SessionResult | None:
    """Add the lines about the choice to the summary."""
    if session is None:
        return None
    return replace(session, lines=[*session.lines, *lines], figures={**session.figures, "auto": lines})
