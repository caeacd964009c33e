"""The section with the learning curves of a run."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from moe_beyond.lookahead import Lookahead
from moe_beyond.metrics.names import of_budget, of_lookahead
from moe_beyond.report.html.page import Chart, Section
from moe_beyond.report.html.subject import validation_replay
from moe_beyond.report.html.svg import SERIES, Line, fit_axis, format_number, format_percent, line_chart
from moe_beyond.report.labels import BASELINES, BYTES_AXIS

Curves = dict[str, list[tuple[float, float]]]
"""Logged metric -> ``(step, value)`` of each logged value."""

MOST_POINTS = 200
"""Points of the training loss; more would overlap."""


def curves_section(curves: Curves | None, run: bool, run_config: dict[str, Any], first: Lookahead) -> Section:
    """Draw the learning curves.

    Args:
        curves: Logged metrics; None without metrics.csv.
        run: Whether the predictor belongs to a run.
        run_config: Configuration of the run; empty without a run.
        first: First lookahead of the predictor, which replays use by default.
    """
    charts = [*_loss_charts(curves), *_metric_charts(curves, run_config, first)] if curves else []
    charts += _replay_charts(curves, run_config, first) if curves else []
    if curves and charts:
        prose = "The horizontal axis counts optimiser steps. Validation uses the run's own validation split."
        if "train/loss" not in curves:
            prose += (
                " The run has no training loss: the predictor counts, or the fit ended before the first "
                "log_every_n_steps."
            )
    elif run:
        prose = "The run has no metrics that can be drawn: metrics.csv, which a CSVLogger writes, is missing."
    else:
        prose = "No learning curves: this is a predictor folder outside a run, and metrics.csv stays with the run."
    return Section("curves", "Learning curves", prose=[prose], charts=charts)


def _loss_charts(curves: Curves) -> list[Chart]:
    loss = curves.get("train/loss")
    if not loss:
        return []
    group = -(-len(loss) // MOST_POINTS)
    line = _line("loss", _group_means(loss, group), "s0", format_number)
    batches = "each logged batch" if group == 1 else f"logged batches, means of {group}"
    return [_chart("Training loss", "loss", [line], f"Objective on {batches}.", format_number)]


def _metric_charts(curves: Curves, run_config: dict[str, Any], first: Lookahead) -> list[Chart]:
    data = (run_config.get("data") or {}).get("init_args") or {}
    split = f"split {data['val_split']}" if data.get("val_split") else "validation split"
    charts = []
    for metric, title, unit, format_tick in (
        ("recall_at_k", "Validation recall", "recall@k", format_percent),
        ("nll", "Validation NLL", "nats per token and layer", format_number),
    ):
        lookaheads = [first, *_between(curves, "val_lookahead_", f"/{metric}")]
        names = {str(h): of_lookahead("val", h, metric, first=str(h) == str(first)) for h in lookaheads}
        logged = {lookahead: curves[name] for lookahead, name in names.items() if name in curves}
        lines = [
            _line(lookahead, points, style, format_tick)
            for (lookahead, points), style in zip(logged.items(), itertools.cycle(SERIES), strict=False)
        ]
        if lines:
            better = "Higher" if metric == "recall_at_k" else "Lower"
            caption = f"One line per lookahead, all tokens of the {split}. {better} is better."
            charts.append(_chart(title, unit, lines, caption, format_tick))
    return charts


def _replay_charts(curves: Curves, run_config: dict[str, Any], first: Lookahead) -> list[Chart]:
    settings = validation_replay(run_config)
    replay = (
        f"{settings.get('policy') or 'lru'} with prefetch {settings.get('prefetch') or 'top<K>'}, lookahead "
        f"{settings.get('lookahead') or first}, budget {settings.get('budget') or 'unknown'}"
        if settings
        else "the run's replay"
    )
    logged = _between(curves, "val_budget_", "/hit_rate")
    section = (
        of_budget("val", str(settings["budget"]), "") if settings.get("budget") else f"val_budget_{(*logged, '')[0]}/"
    )
    series = [("", "predictor", "s0")]
    series += [(f"{name}_", BASELINES[name].name, BASELINES[name].css_class) for name in ("lru", "belady")]
    charts = []
    for metric, title, unit, format_tick in (
        ("hit_rate", "Validation hit rate", "hit rate", format_percent),
        ("bytes_ratio", "Validation bytes", BYTES_AXIS, format_number),
    ):
        lines = [
            _line(name, curves[f"{section}{prefix}{metric}"], style, format_tick)
            for prefix, name, style in series
            if f"{section}{prefix}{metric}" in curves
        ]
        if lines:
            caption = f"Predictor: {replay}. LRU and Belady: same budget, no prefetching."
            charts.append(_chart(title, unit, lines, caption, format_tick, low=0))
    return charts


def _between(curves: Curves, start: str, end: str) -> list[str]:
    """List the middle parts of the curve names that have the given start and end."""
    return [name[len(start) : -len(end)] for name in curves if name.startswith(start) and name.endswith(end)]


def _group_means(points: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    """Return the mean of each group of consecutive points, at the step of the group's last point."""
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _line(name: str, points: Sequence[tuple[float, float]], style: str, format_tick: Callable[[float], str]) -> Line:
    form = ".1%" if format_tick is format_percent else ".4g"
    return Line(name, tuple(points), style, tuple(f"step {step:,.0f}: {value:{form}}" for step, value in points))


def _chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    caption: str,
    format_tick: Callable[[float], str],
    low: float | None = None,
) -> Chart:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x, y = fit_axis("step", steps, whole=True), fit_axis(unit, values, format_tick=format_tick, low=low)
    return Chart(title, line_chart(f"{title}: {unit} by step", x, y, lines), caption)
