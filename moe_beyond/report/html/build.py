"""Building a page and writing it to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_beyond.evaluation.results import Evaluation
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.files import replacing
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.report.html.page import Section
from moe_beyond.report.html.sections.caveats import caveats_section
from moe_beyond.report.html.sections.experts import experts_section
from moe_beyond.report.html.sections.learning_curves import curves_section
from moe_beyond.report.html.sections.prediction import prediction_section, static_recall
from moe_beyond.report.html.sections.predictor import predictor_section
from moe_beyond.report.html.sections.replay import replay_section
from moe_beyond.report.html.sections.summary import key_figures
from moe_beyond.report.html.sections.timing import timing_section, verdicts
from moe_beyond.report.html.subject import Subject, read_curves, run_config_to_show
from moe_beyond.report.labels import leaks_of
from moe_beyond.report.tables.conditions import format_conditions
from moe_beyond.safe_text import printable_lines
from moe_beyond.simulator.devices import Device
from moe_beyond.traces.analysis.counts import count_routing
from moe_beyond.traces.analysis.statistics import reuse
from moe_beyond.traces.reader import TraceSet
from moe_beyond.version import __version__

TEMPLATE, STYLE = "page.html", "page.css"


def write_page(
    path: str | Path,
    subject: Subject,
    traces: TraceSet,
    split: str | None,
    evaluation: Evaluation,
    *,
    notes: Sequence[str] = (),
    source: ScoreSource,
    devices: Sequence[Device] = (),
    bits: float,
    warmup_tokens: int = 0,
    profile: str | None = None,
) -> None:
    """Write a self-contained HTML page; the same arguments give the same bytes.

    Args:
        path: HTML file to write.
        subject: Predictor folder, and its run.
        traces: Measured trace set.
        split: Measured split; None for all.
        evaluation: Metrics, and results of the strategies of `moe_beyond.report.html.strategies.page_strategies`.
        notes: Relation of the measured text to the predictor, one sentence each, as in `MeasuredText.lines`.
        source: Source of the scores, as passed to `evaluate`.
        devices: Devices of the timing model.
        bits: Bits per parameter in the replays.
        warmup_tokens: Tokens at the start of each sequence that replays do not count (default: 0).
        profile: Name of the pretrained history predictor that ``belief`` reads; None if there is none.

    Raises:
        UserError: A file of the run cannot be read.
    """
    geometry = traces.geometry
    config = read_config(subject.folder)
    config |= {"lookaheads": source.lookaheads, "causal": source.causal}
    run_config = {} if subject.run is None else run_config_to_show(subject.run)
    curves = None if subject.run is None else read_curves(subject.run)
    counts = count_routing(traces, split, layer_pairs=False)
    static = static_recall(counts.activations, geometry.top_k)
    tokens = sum(shard.tokens for shard in traces.shards(split))
    names = [device.name for device in devices]
    sections: list[Section] = [
        predictor_section(config, run_config),
        curves_section(curves, subject.run is not None, run_config, config["lookaheads"][0]),
        prediction_section(evaluation.metrics, static, geometry),
        replay_section(evaluation.results),
        *([timing_section(evaluation.results, devices, geometry, bits)] if devices else []),
        experts_section(counts.activations, reuse(counts.overlaps, counts.non_initial_uses), geometry, tokens),
        caveats_section(traces, config, warmup_tokens=warmup_tokens, devices=names, profile=profile),
    ]
    page = _template().render(
        version=__version__,
        title=f"{source.name} for {geometry.model}",
        lead=f"This predictor scores which experts of {geometry.model} ({geometry.describe_shape()}) each token will "
        "use. The page shows how accurate its scores are, and how much they help when only some experts fit into GPU "
        "memory.",
        warnings=_warnings(leaks_of(0 in config["lookaheads"], config["causal"]), notes),
        keys=key_figures(evaluation.metrics, evaluation.results, float(np.mean(static)), geometry, names),
        verdict=next(iter(verdicts(evaluation.results)), ""),
        conditions=format_conditions(evaluation.results),
        measured=_measured(traces, split, bits, warmup_tokens),
        sections=sections,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _measured(traces: TraceSet, split: str | None, bits: float, warmup_tokens: int) -> dict[str, str]:
    """Describe the measured traces."""
    manifest, shards = traces.manifest, traces.shards(split)
    tokens, sequences = sum(shard.tokens for shard in shards), sum(shard.sequences for shard in shards)
    warmup = f"{warmup_tokens:,} tokens per sequence, not counted in replays" if warmup_tokens else "none"
    return {
        "traces": manifest.source,
        "split": split or "all",
        "size": f"{sequences:,} sequences, {tokens:,} tokens",
        "model": f"{manifest.model_id} at {bits:g} bits per parameter",
        "warm-up": warmup,
        "fingerprint": manifest.fingerprint,
    }


def _warnings(leaks: Sequence[str], notes: Sequence[str]) -> list[str]:
    """Return the warnings above the summary."""
    leak = [f"LEAK: this predictor {' and '.join(leaks)}. No runtime can use such scores."] if leaks else []
    return [*leak, *(f"{note}." for note in notes)]


def _shown(value: Any) -> Any:
    """Return a value of the page without characters that reorder text or that no file can hold."""
    return printable_lines(value) if type(value) is str else value


def _template() -> Any:
    loader = PackageLoader("moe_beyond.report.html", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    style = loader.get_source(environment, STYLE)[0]
    environment.globals["style"] = Markup(style)  # nosec B704 # a file of this package, not user input
    return environment.get_template(TEMPLATE)
