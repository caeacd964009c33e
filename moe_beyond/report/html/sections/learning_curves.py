"""The part of a page that says how a fit went."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from moe_beyond.lookahead import Lookahead
from moe_beyond.metrics.names import of_budget, of_lookahead
from moe_beyond.report.html.model import Chart, Section
from moe_beyond.report.html.source import replay_while_fitting
from moe_beyond.report.html.svg import SERIES, Line, axis, line_chart, number, percent

Curves = dict[str, list[tuple[float, float]]]

MOST_POINTS = 200
"""Of a training loss: more would not be told apart."""
REFERENCES = {"": "s0", "lru_": "lru", "belady_": "belady"}


def curves_section(curves: Curves | None, run: bool, run_config: dict[str, Any], first: Lookahead) -> Section:
    """Draw how a fit went.

    Args:
        curves: What the run logged, by figure; None where it kept nothing.
        run: Whether there is a run at all.
        run_config: Its configuration, or nothing.
        first: The predictor's first lookahead, by which replays ask unless the configuration names another.
    """
    charts = _curves(curves, run_config, first) if curves else []
    if curves and charts:
        prose = "The horizontal axis counts steps of the optimiser. Validations are of the run's own validation split."
        if "train/loss" not in curves:
            prose += " No training loss was logged: the fit has none (it counts), or ended before log_every_n_steps."
    elif run:
        prose = "The run kept no figures that can be drawn: it has no metrics.csv, which a CSVLogger writes."
    else:
        prose = (
            "There are no learning curves: this is a predictor folder outside a run, and the figures of a fit stay "
            "with its run (metrics.csv)."
        )
    return Section("curves", "How the fit went", prose=[prose], charts=charts)


def _curves(curves: Curves, run_config: dict[str, Any], first: Lookahead) -> list[Chart]:
    charts = []
    if loss := curves.get("train/loss"):
        every = -(-len(loss) // MOST_POINTS)
        line = _line("loss", _means(loss, every), "s0", number)
        what = "each logged training batch" if every == 1 else f"logged training batches, means of {every}"
        charts.append(_chart("Training loss", "loss", [line], f"The objective on {what}."))
    data = (run_config.get("data") or {}).get("init_args") or {}
    split = f"split {data['val_split']}" if data.get("val_split") else "validation split"
    for figure, title, unit, words in (
        ("recall_at_k", "Recall in validation", "recall@k", percent),
        ("nll", "Likelihood in validation", "NLL, nats a token and layer", number),
    ):
        lookaheads = [first, *_between(curves, "val_lookahead_", f"/{figure}")]
        names = {str(h): of_lookahead("val", h, figure, first=str(h) == str(first)) for h in lookaheads}
        found = {lookahead: curves[name] for lookahead, name in names.items() if name in curves}
        lines = [
            _line(lookahead, points, style, words)
            for (lookahead, points), style in zip(found.items(), itertools.cycle(SERIES), strict=False)
        ]
        if lines:
            better = "Higher" if figure == "recall_at_k" else "Lower"
            charts.append(
                _chart(title, unit, lines, f"A line a lookahead, all tokens of the {split}. {better} is better.")
            )
    replay = replay_while_fitting(run_config)
    what = (
        f"{replay.get('policy') or 'lru'} with {replay.get('prefetch') or 'top<K>'} asked for at lookahead "
        f"{replay.get('lookahead') or first}, budget {replay.get('budget') or 'unknown'}"
        if replay
        else "the run's replay"
    )
    logged = _between(curves, "val_budget_", "/hit_rate")
    section = of_budget("val", replay["budget"], "") if replay.get("budget") else f"val_budget_{(*logged, '')[0]}/"
    for figure, title, unit, words in (
        ("hit_rate", "Hits in validation", "hit rate", percent),
        ("bytes_ratio", "Bytes in validation", "bytes moved / demanded", number),
    ):
        names = {"": "predictor", "lru_": "LRU", "belady_": "Belady"}
        lines = [
            _line(names[prefix], curves[f"{section}{prefix}{figure}"], style, words)
            for prefix, style in REFERENCES.items()
            if f"{section}{prefix}{figure}" in curves
        ]
        if lines:
            charts.append(
                _chart(title, unit, lines, f"Predictor: {what}; LRU and Belady at the same budget, no prefetch.")
            )
    return charts


def _between(curves: Curves, before: str, after: str) -> list[str]:
    """List the parts of the names of curves between a start and an end."""
    return [name[len(before) : -len(after)] for name in curves if name.startswith(before) and name.endswith(after)]


def _means(points: Sequence[tuple[float, float]], every: int) -> list[tuple[float, float]]:
    """Return the means of so many points in a row, each at the last one's step."""
    parts = [points[start : start + every] for start in range(0, len(points), every)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _line(name: str, points: Sequence[tuple[float, float]], style: str, words: Callable[[float], str]) -> Line:
    return Line(name, tuple(points), style, tuple(f"step {step:,.0f}: {_told(value, words)}" for step, value in points))


def _told(value: float, words: Callable[[float], str]) -> str:
    return f"{value:.1%}" if words is percent else f"{value:.4g}"


def _chart(title: str, unit: str, lines: Sequence[Line], caption: str) -> Chart:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    shares = any("%" in told for line in lines for told in line.told)
    x = axis("step", steps, whole=True)
    y = axis(unit, values, words=percent if shares else number)
    return Chart(title, line_chart(f"{title}: {unit} by step", x, y, lines), caption)
