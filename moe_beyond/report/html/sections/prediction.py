"""The part of a page that says how well experts are predicted."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.geometry import Geometry
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.report.html.model import NOTHING, Chart, Section, Table
from moe_beyond.report.html.svg import SERIES, Line, axis, line_chart, number, percent, reliability_chart
from moe_beyond.report.tables.results import FIGURES, leaks_of, lookahead_words

SHOWN = (
    "recall_at_k",
    "gate_mass_at_k",
    "f1_micro",
    "f1_macro",
    "average_precision",
    "exact_match",
    "nll",
    "calibration_error",
)
"""Of the figures of a lookahead. Per-label accuracy and two-class F1 are high by construction, and left out."""


def fixed_recall(counts: npt.NDArray[np.int64], top_k: int) -> npt.NDArray[np.float64]:
    """Return each layer's recall of naming the same K experts for every token, the best of these very traces ``(L,)``.

    Args:
        counts: ``(L, E)``, how often each expert was chosen.
        top_k: K.
    """
    best = np.sort(counts, axis=1)[:, -top_k:].sum(1)
    found: npt.NDArray[np.float64] = best / counts.sum(1).clip(min=1)
    return found


def prediction_section(
    metrics: Sequence[LookaheadMetrics], fixed: npt.NDArray[np.float64], geometry: Geometry
) -> Section:
    """Show how well experts are predicted: by lookahead, by layer, and as probabilities.

    Args:
        metrics: A row a lookahead.
        fixed: ``(L,)``, recall of the best fixed choice.
        geometry: The model.
    """
    k, tokens = metrics[0].k, metrics[0].tokens
    names = [lookahead_words(row.lookahead, row.causal) for row in metrics]
    shown = {name: how for name, how in FIGURES.items() if name in SHOWN and name in metrics[0].figures()}
    figures = [
        [name, *(format(getattr(row, figure), shape) for figure, (_, shape) in shown.items())]
        for name, row in zip(names, metrics, strict=True)
    ]
    headings = ["lookahead", *(heading for heading, _ in shown.values())]
    by_lookahead = Table(
        f"Prediction by lookahead, over {tokens:,} tokens",
        f"k = {k}. Recall ranks the scores; micro, macro F1 and exact "
        "cut them at 0.5; NLL (nats a token and layer) and calibration error take them as probabilities.",
        headings,
        [figures],
    )
    layers = geometry.moe_layers
    charts = []
    for figure, title, unit, words, caption in (
        ("recall_at_k", "Recall by layer", f"recall@{k}", percent, "Higher is better. Best fixed: the same experts for "
         "every token, the most used ones of these very traces."),
        ("nll", "Likelihood by layer", "NLL, nats a token", number, "Lower is better: what a token's choice in a layer "
         "costs, were it coded with these probabilities."),
    ):  # fmt: skip
        shares = words is percent
        lines = [
            _by_layer(_short(row), layers, [getattr(layer, figure) for layer in row.by_layer], style, shares)
            for row, style in zip(metrics, itertools.cycle(SERIES), strict=False)
        ]
        if shares:
            lines.append(_by_layer("best fixed", layers, fixed.tolist(), "fixed", shares))
        values = [value for line in lines for _, value in line.points]
        y = axis(unit, values, words=words, low=0, high=1) if shares else axis(unit, values)
        chart = line_chart(f"{title}, a line a lookahead", axis("model layer", layers, low=layers[0], high=layers[-1],
                           whole=True), y, lines)  # fmt: skip
        charts.append(Chart(title, chart, f"A line a lookahead, over {tokens:,} tokens. {caption}"))
    for name, row, style in zip(names, metrics, itertools.cycle(SERIES), strict=False):
        chart = reliability_chart(f"Share chosen by probability said, lookahead {name}", row.reliability, style)
        caption = f"Calibration error {row.calibration_error:.2%}. On the dotted line what is said comes as often."
        charts.append(Chart(f"Calibration, lookahead {name}", chart, caption))
    recalls = Table(
        "Recall by layer, as a table",
        f"Recall@{k}, over {tokens:,} tokens. Best fixed: the same experts for every token, the best of these traces.",
        ["layer", *(f"lookahead {name}" for name in names), "best fixed"],
        [
            [
                [str(layer), *(f"{row.by_layer[n].recall_at_k:.1%}" for row in metrics), f"{fixed[n]:.1%}"]
                for n, layer in enumerate(layers)
            ]
        ],
    )
    return Section(
        "prediction",
        "What it predicts",
        prose=[
            "Bars below the calibration curves count the labels, an expert of a token and layer each, on a logarithmic "
            "scale: nearly all are of experts that hardly anybody expects."
        ],
        charts=charts,
        tables=[by_lookahead],
        folded=[recalls, _reliability_table(metrics, names)],
    )


def _short(row: LookaheadMetrics) -> str:
    """Name a lookahead at the end of a line."""
    return f"{row.lookahead}{' (LEAK)' if leaks_of(row.lookahead == 0, row.causal) else ''}"


def _by_layer(name: str, layers: Sequence[int], values: Sequence[float], style: str, shares: bool) -> Line:
    told = [f"layer {layer}: {value:.1%}" if shares else f"layer {layer}: {value:.2f}"
            for layer, value in zip(layers, values, strict=True)]  # fmt: skip
    return Line(name, tuple(zip(map(float, layers), values, strict=True)), style, tuple(told))


def _reliability_table(metrics: Sequence[LookaheadMetrics], names: Sequence[str]) -> Table:
    headings = ["probability"]
    for name in names:
        headings += [f"lookahead {name}: labels", "said", "chosen"]
    rows = []
    for number_, one in enumerate(metrics[0].reliability):
        cells = [f"{one.low:.1%} to {one.high:.1%}"]
        for row in metrics:
            found = row.reliability[number_]
            shares = (found.mean_probability, found.chosen_share)
            cells += [f"{found.labels:,}", *(NOTHING if share is None else f"{share:.1%}" for share in shares)]
        rows.append(cells)
    return Table(
        "Calibration, as a table",
        "Of all layers' labels that were scored so: how probable they were on average and how many were chosen",
        headings,
        [rows],
    )
