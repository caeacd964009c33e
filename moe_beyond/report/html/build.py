"""The page itself."""

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
from moe_beyond.report.html.sections.about import limits_section, predictor_section
from moe_beyond.report.html.sections.experts import experts_section
from moe_beyond.report.html.sections.learning_curves import curves_section
from moe_beyond.report.html.sections.prediction import fixed_recall, prediction_section
from moe_beyond.report.html.sections.replay import time_section, verdicts, worth_section
from moe_beyond.report.html.sections.summary import keys
from moe_beyond.report.html.source import Subject, read_curves, read_run_config
from moe_beyond.report.tables.conditions import conditions
from moe_beyond.report.tables.results import leaks_of
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
    found: Evaluation,
    *,
    notes: Sequence[str] = (),
    source: ScoreSource,
    devices: Sequence[Device] = (),
    bits: float,
    warmup_tokens: int = 0,
    profile: str | None = None,
) -> None:
    """Write a page that needs nothing but itself; the same findings give the same bytes.

    Args:
        path: The HTML file.
        subject: What it is about.
        traces: What was measured on.
        split: One split of them, or all.
        found: What `evaluate` said of the strategies of `moe_beyond.report.html.strategies.page_strategies`.
        notes: Relation of the measured text to the predictor, one sentence each, as in `MeasuredText.lines`.
        source: The predictor as `evaluate` was given it.
        devices: For which there are times.
        bits: Bits per parameter of the replays.
        warmup_tokens: Tokens of a sequence that the replays did not count.
        profile: The published history that `belief` used, or None.

    Raises:
        UserError: A file of the run cannot be read.
    """
    geometry, manifest = traces.geometry, traces.manifest
    known = {"lookaheads": source.lookaheads, "causal": source.causal, "available_after": source.available_after}
    config = read_config(subject.folder) | known
    run_config = {} if subject.run is None else read_run_config(subject.run)
    curves = None if subject.run is None else read_curves(subject.run)
    counts = count_routing(traces, split, layer_pairs=False)
    fixed = fixed_recall(counts.activations, geometry.top_k)
    shards = traces.shards(split)
    tokens, sequences = sum(shard.tokens for shard in shards), sum(shard.sequences for shard in shards)
    names = [device.name for device in devices]
    sections = [
        predictor_section(config, run_config),
        curves_section(curves, subject.run is not None, run_config, config["lookaheads"][0]),
        prediction_section(found.metrics, fixed, geometry),
        worth_section(found.results),
        *([time_section(found.results, devices, geometry, bits)] if devices else []),
        experts_section(counts.activations, reuse(counts.overlaps, counts.non_initial_uses), geometry, tokens),
        limits_section(traces, config, warmup_tokens=warmup_tokens, devices=names, profile=profile),
    ]
    leaks = leaks_of(0 in config["lookaheads"], config["causal"])
    measured = {
        "traces": manifest.source,
        "split": split or "all",
        "amount": f"{sequences:,} sequences, {tokens:,} tokens",
        "model": f"{manifest.model_id} at {bits:g} bits",
        "not counted": f"the first {warmup_tokens:,} tokens of a sequence (in replays)" if warmup_tokens else "nothing",
        "fingerprint": manifest.fingerprint,
    }
    page = _template().render(
        version=__version__,
        title=f"{source.name} for {geometry.model}",
        lead=f"It predicts which experts of {geometry.model} ({geometry.describe_shape()}) a token is routed to. How "
        "well, and what that is worth where not all experts fit into memory, is shown here.",
        warnings=_warnings(leaks, notes),
        keys=keys(found.metrics, found.results, float(np.mean(fixed)), geometry, names),
        verdict=next(iter(verdicts(found.results)), ""),
        conditions=conditions(found.results),
        measured=measured,
        sections=sections,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _warnings(leaks: Sequence[str], notes: Sequence[str]) -> list[str]:
    """Return what a reader must know before the first figure."""
    leak = [f"LEAK: this predictor {' and '.join(leaks)}. No runtime could."] if leaks else []
    return [*leak, *(f"{note}." for note in notes)]


def _template() -> Any:
    loader = PackageLoader("moe_beyond.report.html", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = loader.get_source(environment, STYLE)[0]
    environment.globals["style"] = Markup(style)  # our own
    return environment.get_template(TEMPLATE)
