"""The section on the quality of predictions."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.report.html.page import Chart, Section, Table
from moe_beyond.report.html.svg import (
    SERIES,
    Axis,
    Line,
    fit_axis,
    format_percent,
    line_chart,
    reliability_chart,
)
from moe_beyond.report.labels import BASELINES, METRIC_COLUMNS, NO_VALUE, metric_lookahead

MISLEADING = ("f1_two_class", "accuracy")
"""Metrics that are high by construction; the page leaves them out."""


def static_recall(counts: npt.NDArray[np.int64], top_k: int) -> npt.NDArray[np.float64]:
    """Return the recall of the best static prediction, the same K experts for every token, ``(L,)``.

    Args:
        counts: Activations of each expert in the measured traces, ``(L, E)``.
        top_k: Number of experts K to predict.
    """
    best = np.sort(counts, axis=1)[:, -top_k:].sum(1)
    recall: npt.NDArray[np.float64] = best / counts.sum(1).clip(min=1)
    return recall


def prediction_section(
    metrics: Sequence[LookaheadMetrics], static: npt.NDArray[np.float64], geometry: Geometry
) -> Section:
    """Show metrics by lookahead and by layer, and the calibration.

    Args:
        metrics: Rows of metrics, one per lookahead.
        static: Recall of the best static prediction, ``(L,)``.
        geometry: Geometry of the model.
    """
    names = [metric_lookahead(row.lookahead, row.causal) for row in metrics]
    return Section(
        "prediction",
        "Prediction quality",
        prose=[
            "Each layer of each token gives one label per expert: selected or not. The bars below a calibration curve "
            "count labels on a logarithmic scale; most labels have a low predicted probability."
        ],
        charts=[
            _recall_chart(metrics, static, geometry.moe_layers),
            _likelihood_chart(metrics, geometry.moe_layers),
            *_calibration_charts(metrics, names),
        ],
        tables=[_lookahead_table(metrics, names)],
        folded=[_layer_table(metrics, names, static, geometry.moe_layers), _calibration_table(metrics, names)],
    )


def _lookahead_table(metrics: Sequence[LookaheadMetrics], names: Sequence[str]) -> Table:
    columns = {
        name: column
        for name, column in METRIC_COLUMNS.items()
        if name not in MISLEADING and name in metrics[0].figures()
    }
    rows = [
        [name, *(format(getattr(row, metric), form) for metric, (_, form) in columns.items())]
        for name, row in zip(names, metrics, strict=True)
    ]
    return Table(
        f"Metrics by lookahead, over {metrics[0].tokens:,} tokens",
        f"k = {metrics[0].k}. Micro F1, macro F1 and exact match count experts with a score above 0.5 as predicted. "
        "NLL: nats per token and layer. Calibration error: mean distance of predicted probability and observed "
        "frequency.",
        ["lookahead", *(heading for heading, _ in columns.values())],
        [rows],
    )


def _recall_chart(metrics: Sequence[LookaheadMetrics], static: npt.NDArray[np.float64], layers: Sequence[int]) -> Chart:
    k, tokens = metrics[0].k, metrics[0].tokens
    best_static = BASELINES["static_hindsight"]
    values = [[layer.recall_at_k for layer in row.by_layer] for row in metrics]
    lines = [
        _layer_line(_end_label(row), layers, recalls, style, ".1%")
        for row, recalls, style in zip(metrics, values, itertools.cycle(SERIES), strict=False)
    ]
    lines.append(_layer_line(best_static.name, layers, static.tolist(), best_static.css_class, ".1%"))
    y = fit_axis(f"recall@{k}", (), format_tick=format_percent, low=0, high=1)
    return Chart(
        "Recall by layer",
        line_chart("Recall by layer, one line per lookahead", _layer_axis(layers), y, lines),
        f"One line per lookahead, over {tokens:,} tokens. Higher is better. {best_static.name.capitalize()}: the most "
        "popular experts of these traces, the same for every token.",
    )


def _likelihood_chart(metrics: Sequence[LookaheadMetrics], layers: Sequence[int]) -> Chart:
    values = [[layer.nll for layer in row.by_layer] for row in metrics]
    lines = [
        _layer_line(_end_label(row), layers, losses, style, ".2f")
        for row, losses, style in zip(metrics, values, itertools.cycle(SERIES), strict=False)
    ]
    y = fit_axis("NLL, nats per token", itertools.chain(*values))
    return Chart(
        "Negative log-likelihood by layer",
        line_chart("NLL by layer, one line per lookahead", _layer_axis(layers), y, lines),
        f"One line per lookahead, over {metrics[0].tokens:,} tokens. Lower is better. The axis does not start at 0.",
    )


def _calibration_charts(metrics: Sequence[LookaheadMetrics], names: Sequence[str]) -> list[Chart]:
    return [
        Chart(
            f"Calibration, lookahead {name}",
            reliability_chart(f"Observed frequency by probability, lookahead {name}", row.reliability, style),
            f"Calibration error {row.calibration_error:.2%}. The dotted line marks perfect calibration.",
        )
        for name, row, style in zip(names, metrics, itertools.cycle(SERIES), strict=False)
    ]


def _layer_table(
    metrics: Sequence[LookaheadMetrics],
    names: Sequence[str],
    static: npt.NDArray[np.float64],
    layers: Sequence[int],
) -> Table:
    best_static = BASELINES["static_hindsight"].name
    rows = [
        [str(layer), *(f"{row.by_layer[n].recall_at_k:.1%}" for row in metrics), f"{static[n]:.1%}"]
        for n, layer in enumerate(layers)
    ]
    return Table(
        "Table: recall by layer",
        f"Recall@{metrics[0].k} over {metrics[0].tokens:,} tokens. {best_static.capitalize()}: the most popular "
        "experts of these traces, the same for every token.",
        ["layer", *(f"lookahead {name}" for name in names), best_static],
        [rows],
    )


def _calibration_table(metrics: Sequence[LookaheadMetrics], names: Sequence[str]) -> Table:
    headings = ["probability"]
    for name in names:
        headings += [f"lookahead {name}: labels", "predicted", "observed"]
    rows = []
    for number, first in enumerate(metrics[0].reliability):
        cells = [f"{first.low:.1%} to {first.high:.1%}"]
        for row in metrics:
            bin_ = row.reliability[number]
            shares = (bin_.mean_probability, bin_.selected_share)
            cells += [f"{bin_.labels:,}", *(NO_VALUE if share is None else f"{share:.1%}" for share in shares)]
        rows.append(cells)
    return Table(
        "Table: calibration",
        "Labels of all layers, grouped by predicted probability; their mean probability, and the share of them that "
        "the router selected.",
        headings,
        [rows],
    )


def _end_label(row: LookaheadMetrics) -> str:
    return metric_lookahead(row.lookahead, row.causal, short=True)


def _layer_axis(layers: Sequence[int]) -> Axis:
    return fit_axis("model layer", layers, low=layers[0], high=layers[-1], whole=True)


def _layer_line(name: str, layers: Sequence[int], values: Sequence[float], style: str, form: str) -> Line:
    tooltips = [f"layer {layer}: {value:{form}}" for layer, value in zip(layers, values, strict=True)]
    return Line(name, tuple(zip(map(float, layers), values, strict=True)), style, tuple(tooltips))
