"""The parts of a page that say what was found on the traces: what is predicted, what it is worth, which are hot."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.evaluation.strategies import CLAIRVOYANT
from moe_beyond.geometry import Geometry
from moe_beyond.replay import Result
from moe_beyond.replay.devices import Device
from moe_beyond.report.page.charts import (
    HEAT_EDGES,
    SERIES,
    Line,
    axis,
    heat_map,
    line_chart,
    number,
    percent,
    reliability_chart,
    swatch,
)
from moe_beyond.report.page.contents import Chart, Key, Section, Table
from moe_beyond.report.page.replays import at_headline
from moe_beyond.report.results import FIGURES, leaks_of, lookahead_words, scores_words
from moe_beyond.traces.statistics import normalized_entropy

REFERENCES = {
    "lru": ("LRU", "lru"),
    "belady": ("Belady", "belady"),
    "static_hindsight": ("best fixed", "fixed"),
    CLAIRVOYANT: ("clairvoyant", "clairvoyant"),
}
"""Strategies that others stand beside: their name in a chart, and their line's style."""
HOTTEST = 3
NOTHING = "-"
SLOTS_BY_DEMAND = "Slots / demand: below 1 not even one token's experts fit."


def fixed_recall(counts: npt.NDArray[np.int64], top_k: int) -> npt.NDArray[np.float64]:
    """Return each layer's recall of naming the same K experts for every token, the best of these very traces ``(L,)``.

    Args:
        counts: ``(L, E)``, how often each expert was chosen.
        top_k: K.
    """
    best = np.sort(counts, axis=1)[:, -top_k:].sum(1)
    found: npt.NDArray[np.float64] = best / counts.sum(1)
    return found


def keys(
    metrics: Sequence[dict[str, Any]],
    results: Sequence[Result],
    fixed: float,
    geometry: Geometry,
    devices: Sequence[str],
) -> list[Key]:
    """Choose the figures of the summary.

    Args:
        metrics: A row a lookahead.
        results: Of all replays.
        fixed: Recall of the best fixed choice.
        geometry: The model.
        devices: Names of the devices; the first one's time is shown.
    """
    row, k = metrics[0], metrics[0]["k"]
    plain = {result.strategy: result for result in at_headline([r for r in results if r.device is None])}
    ours, lru, belady = next(iter(plain.values())), plain["lru"], plain["belady"]
    budget = f"{ours.budget_slots:,} slots, {ours.budget_share:.1%} of all experts"
    found = [
        Key(
            f"recall@{k}, lookahead {lookahead_words(row['lookahead'], row['causal'])}",
            f"{row['recall_at_k']:.1%}",
            f"over {row['tokens']:,} tokens; the best fixed {k} experts a layer: {fixed:.1%}; "
            f"by chance: {geometry.top_k / geometry.num_experts:.1%}",
        ),
        Key(
            f"hits, {ours.strategy}, lookahead {scores_words(ours)}",
            f"{ours.hit_rate:.1%}",
            f"with {budget}; LRU {lru.hit_rate:.1%}, Belady {belady.hit_rate:.1%}",
        ),
        Key(
            "bytes moved / demanded, same replay",
            f"{ours.bytes_ratio:.2f}",
            f"LRU {lru.bytes_ratio:.2f}, Belady {belady.bytes_ratio:.2f}; 1.00 moves one expert for every access",
        ),
    ]
    for device in devices[:1]:
        timed = [result for result in results if result.device == device]
        speeds = {result.strategy: _speed(result) for result in at_headline(timed)}
        resident = next(result for result in timed if result.policy == "all_resident")
        found.append(
            Key(
                f"tokens/s on {device}, same budget",
                speeds[ours.strategy],
                f"LRU {speeds['lru']}, clairvoyant prefetch {speeds[CLAIRVOYANT]}, all resident {_speed(resident)}; "
                "MoE layers alone, by the replay's clock",
            )
        )
    error = f"{row['calibration_error']:.2%}"
    beside = (
        f"lookahead {row['lookahead']}: how far probabilities are off on average; NLL {row['nll']:.2f} nats a token "
    )
    return [*found, Key("calibration error", error, f"{beside}and layer")]


def _speed(result: Result) -> str:
    return NOTHING if result.tokens_per_second is None else f"{result.tokens_per_second:.1f}"


def prediction_section(
    metrics: Sequence[dict[str, Any]], fixed: npt.NDArray[np.float64], geometry: Geometry
) -> Section:
    """Show how well experts are predicted: by lookahead, by layer, and as probabilities.

    Args:
        metrics: A row a lookahead.
        fixed: ``(L,)``, recall of the best fixed choice.
        geometry: The model.
    """
    k, tokens = metrics[0]["k"], metrics[0]["tokens"]
    names = [lookahead_words(row["lookahead"], row["causal"]) for row in metrics]
    figures = [
        [name, *(format(row[figure], shape) for figure, (_, shape) in FIGURES.items() if figure in SHOWN)]
        for name, row in zip(names, metrics, strict=True)
    ]
    headings = ["lookahead", *(f"{heading}" for figure, (heading, _) in FIGURES.items() if figure in SHOWN)]
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
            _by_layer(_short(row), layers, [layer[figure] for layer in row["by_layer"]], style, shares)
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
        chart = reliability_chart(f"Share chosen by probability said, lookahead {name}", row["reliability"], style)
        caption = f"Calibration error {row['calibration_error']:.2%}. On the dotted line what is said comes as often."
        charts.append(Chart(f"Calibration, lookahead {name}", chart, caption))
    recalls = Table(
        "Recall by layer, as a table",
        f"Recall@{k}, over {tokens:,} tokens. Best fixed: the same experts for every token, the best of these traces.",
        ["layer", *(f"lookahead {name}" for name in names), "best fixed"],
        [
            [
                [str(layer), *(f"{row['by_layer'][n]['recall_at_k']:.1%}" for row in metrics), f"{fixed[n]:.1%}"]
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


SHOWN = ("recall_at_k", "f1_micro", "f1_macro", "average_precision", "exact_match", "nll", "calibration_error")
"""Of the figures of a lookahead. Per-label accuracy and two-class F1 are high by construction, and left out."""


def _short(row: dict[str, Any]) -> str:
    """Name a lookahead at the end of a line."""
    return f"{row['lookahead']}{' (LEAK)' if leaks_of(row['lookahead'] == 0, row['causal']) else ''}"


def _by_layer(name: str, layers: Sequence[int], values: Sequence[float], style: str, shares: bool) -> Line:
    told = [f"layer {layer}: {value:.1%}" if shares else f"layer {layer}: {value:.2f}"
            for layer, value in zip(layers, values, strict=True)]  # fmt: skip
    return Line(name, tuple(zip(map(float, layers), values, strict=True)), style, tuple(told))


def _reliability_table(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    headings = ["probability"]
    for name in names:
        headings += [f"lookahead {name}: labels", "said", "chosen"]
    rows = []
    for number_, one in enumerate(metrics[0]["reliability"]):
        cells = [f"{one['from']:.1%} to {one['to']:.1%}"]
        for row in metrics:
            found = row["reliability"][number_]
            shares = (found["mean_probability"], found["chosen_share"])
            cells += [f"{found['labels']:,}", *(NOTHING if share is None else f"{share:.1%}" for share in shares)]
        rows.append(cells)
    return Table(
        "Calibration, as a table",
        "Of all layers' labels that were scored so: how probable they were on average and how many were chosen",
        headings,
        [rows],
    )


def worth_section(results: Sequence[Result]) -> Section:
    """Show hits and bytes over budgets, and against each other."""
    plain = [result for result in results if result.device is None]
    charts = [
        _over_budgets("Hits by budget", "hit rate", plain, lambda r: r.hit_rate, percent,
                      "Up is better. LRU and Belady move experts on demand alone."),
        _over_budgets("Bytes by budget", "bytes moved / demanded", plain, lambda r: r.bytes_ratio, number,
                      "Down is better: 1 moves one expert for every access, prefetches counted."),
        _frontier(plain),
    ]  # fmt: skip
    shown = at_headline(plain)
    first = shown[0]
    enough = first.demand_ratio >= 1
    asked = f"Prefetches ask by lookahead {scores_words(first)}. " if first.prefetch != "none" else ""
    which = "the smallest budget that holds the experts of a token" if enough else "the largest budget"
    return Section(
        "worth",
        "What it is worth under a memory budget",
        prose=[
            f"Replays over {first.accesses:,} accesses, an expert that a token demands in a layer each. The budget is "
            "the experts that fit, of all layers together; below one token's experts (the upright line) a cache cannot "
            f"even hold what a single token needs. {asked}The table below is at {which}; so is the summary."
        ],
        charts=charts,
        tables=[_results_table(shown)],
        folded=[_results_table(plain, every=True)],
    )


def time_section(results: Sequence[Result], devices: Sequence[Device], geometry: Geometry, bits: float) -> Section:
    """Show tokens a second and stalls on each device.

    Args:
        results: Of all replays.
        devices: On which.
        geometry: The model.
        bits: Bits per parameter.
    """
    charts, tables = [], []
    all_bytes = geometry.total_experts * geometry.params_per_expert * bits / 8
    for device in devices:
        timed = [result for result in results if result.device == device.name]
        resident = next(result for result in timed if result.policy == "all_resident")
        caption = (
            f"Link {device.link_gb_per_s:g} GB/s, memory {device.memory_gb:g} GB at {device.memory_gb_per_s:g} GB/s. "
            f"With all experts resident it would be {_speed(resident)} tokens/s."
        )
        full = (device.memory_gb * 1e9 / all_bytes, f"{device.memory_gb:g} GB full")
        charts.append(
            _over_budgets(device.name, "tokens/s", timed, lambda r: r.tokens_per_second, number, caption, marks=[full])
        )
        tables.append(_times_table([*at_headline(timed), resident], device))
    return Section(
        "time",
        "What it is worth in time",
        prose=[
            "The same strategies with a clock. A prefetch takes time on the link, and what comes late is waited for, "
            "so hits are fewer than above. Speeds are of the MoE layers alone. Where the experts alone would fill the "
            "device's memory an upright line says so, if it is within the budgets shown."
        ],
        charts=charts,
        tables=tables,
        folded=[
            _times_table([r for r in results if r.device == device.name], device, every=True) for device in devices
        ],
    )


def _name_and_style(result: Result, strategies: Sequence[str]) -> tuple[str, str]:
    if result.strategy in REFERENCES:
        return REFERENCES[result.strategy]
    return result.strategy, SERIES[strategies.index(result.strategy)]


def _lines(
    results: Sequence[Result], point: Callable[[Result], tuple[float, float | None]], told: Callable[[Result], str]
) -> list[Line]:
    """Gather each strategy's points over budgets."""
    results = [result for result in results if result.policy != "all_resident"]
    strategies = list(dict.fromkeys(r.strategy for r in results if r.strategy not in REFERENCES))
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.budget_slots):
        if point(result)[1] is not None:
            found.setdefault(result.strategy, []).append(result)
    lines = []
    for line in found.values():
        name, style = _name_and_style(line[0], strategies)
        points = tuple((x, y) for x, y in map(point, line) if y is not None)
        lines.append(Line(name, points, style, tuple(map(told, line))))
    return lines


def _told(result: Result) -> str:
    words = (
        f"{result.budget_slots:,} slots ({result.budget_share:.1%}): {result.hit_rate:.1%} hits, "
        f"{result.bytes_ratio:.2f} bytes"
    )
    return words if result.tokens_per_second is None else f"{words}, {_speed(result)} tokens/s"


def _over_budgets(
    title: str,
    unit: str,
    results: Sequence[Result],
    value: Callable[[Result], float | None],
    words: Callable[[float], str],
    caption: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    lines = _lines(results, lambda result: (result.budget_share, value(result)), _told)
    values = [y for line in lines for _, y in line.points]
    shares = [x for line in lines for x, _ in line.points]
    one_token = results[0].budget_share / results[0].demand_ratio
    x = axis("experts that fit, of all", [0.0, *shares], words=percent, low=0)
    y = axis(unit, values, words=words, low=0, high=1 if words is percent else None)
    picture = line_chart(f"{title}: {unit} by experts that fit", x, y, lines, marks=[(one_token, "one token"), *marks])
    return Chart(title, picture, caption)


def _frontier(results: Sequence[Result]) -> Chart:
    lines = [  # from the largest budget, which moves least, to the smallest: names stand at the right
        Line(line.name, line.points[::-1], line.style, line.told[::-1])
        for line in _lines(results, lambda result: (result.bytes_ratio, result.hit_rate), _told)
    ]
    x = axis("bytes moved / demanded", [x for line in lines for x, _ in line.points], low=0)
    picture = line_chart("Hit rate by bytes moved", x, axis("hit rate", (), words=percent, low=0, high=1), lines)
    return Chart(
        "Hits for bytes",
        picture,
        "Up and to the left is better; each line goes through its budgets. Without prefetch "
        "every hit saves a transfer: those lines coincide.",
    )


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    found: dict[int, list[Result]] = {}
    for result in results:
        found.setdefault(result.budget_slots, []).append(result)
    return list(found.values())


def _rows(results: Sequence[Result], every: bool, cells: Callable[[Result], list[str]]) -> list[list[list[str]]]:
    """Lay out results, a group a budget; with their budget, unless all have one."""
    return [
        [[r.strategy, *([*_budget(r)] if every else []), *cells(r), _lookahead(r)] for r in group]
        for group in _groups(results)
    ]


def _budget(result: Result) -> tuple[str, str]:
    return f"{result.budget_slots:,} ({result.budget_share:.1%})", f"{result.demand_ratio:.2f}"


def _lookahead(result: Result) -> str:
    return NOTHING if result.predictor is None else scores_words(result)


def _headings(every: bool, *names: str) -> list[str]:
    return ["strategy", *(["slots (share)", "slots / demand"] if every else []), *names, "lookahead"]


def _results_table(results: Sequence[Result], *, every: bool = False) -> Table:
    """Lay out results without time, of every budget or of one."""
    rows = _rows(
        results,
        every,
        lambda r: [
            f"{r.hit_rate:.1%}", f"{r.bytes_ratio:.2f}", f"{r.prefetch_transfers:,}", f"{r.wasted_prefetches:,}"
        ],
    )  # fmt: skip
    return Table(
        f"Hits and bytes {_where(results[0], every)}",
        "Bytes: moved over demanded; prefetched and wasted: transfers ahead of demand, and those of them that nothing "
        f"came to need. {SLOTS_BY_DEMAND}",
        _headings(every, "hits", "bytes", "prefetched", "wasted"),
        rows,
    )


def _times_table(results: Sequence[Result], device: Device, *, every: bool = False) -> Table:
    """Lay out results on a device, of every budget or of one."""
    rows = _rows(
        results,
        every,
        lambda r: [
            f"{r.hit_rate:.1%}",
            f"{r.bytes_ratio:.2f}",
            _speed(r),
            *(NOTHING if time is None else f"{time:.1f}" for time in (r.stall_ms_per_token, r.token_ms_p95)),
            f"{r.late_hits / max(r.accesses, 1):.1%}",
        ],
    )
    return Table(
        f"{device.name} {_where(results[0], every)}",
        "Stall and p95 in milliseconds a token; late: asked for, and not there when needed; all_resident has all "
        f"slots. {SLOTS_BY_DEMAND} The device's numbers come from: {device.source or 'not said'}.",
        _headings(every, "hits", "bytes", "tokens/s", "stall, ms", "p95, ms", "late"),
        rows,
    )


def _where(result: Result, every: bool) -> str:
    """Name the budget of a table."""
    if every:
        return "at every budget"
    return f"at {result.budget_slots:,} slots ({result.budget_share:.1%}), slots / demand {result.demand_ratio:.2f}"


def experts_section(
    counts: npt.NDArray[np.int64], reused: npt.NDArray[np.float64], geometry: Geometry, tokens: int
) -> Section:
    """Show which experts are used how much.

    Args:
        counts: ``(L, E)``, how often each was chosen.
        reused: ``(L,)``, the share of a token's experts that the token before used too; NaN where there is no pair.
        geometry: The model.
        tokens: Of the traces.
    """
    shares = counts / counts.sum(1, keepdims=True)
    entropy = normalized_entropy(counts)
    rows = []
    for n, layer in enumerate(geometry.moe_layers):
        hottest = sorted(range(geometry.num_experts), key=lambda e: (-counts[n, e], e))[:HOTTEST]
        rows.append(
            [
                str(layer),
                ", ".join(f"{expert} ({shares[n, expert]:.1%})" for expert in hottest),
                str(int((counts[n] == 0).sum())),
                f"{entropy[n]:.3f}",
                NOTHING if np.isnan(reused[n]) else f"{reused[n]:.1%}",
            ]
        )
    words = ["never used", f"below {HEAT_EDGES[0]:g}"]
    words += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(HEAT_EDGES)]
    words.append(f"{HEAT_EDGES[-1]:g} and more")
    picture = heat_map(
        f"How often each of {geometry.num_experts} experts was chosen in each of {geometry.num_layers} layers",
        shares * geometry.num_experts,
        geometry.moe_layers,
    )
    return Section(
        "experts",
        "Which experts are hot",
        prose=[
            f"How often each expert was chosen by the {tokens:,} tokens, as a multiple of an even share "
            f"({1 / geometry.num_experts:.1%} of a layer's choices)."
        ],
        wide=[Chart("Popularity, layer by expert", picture, "A row a model layer, a column an expert.")],
        shades=[(swatch(f"q{shade}"), said) for shade, said in enumerate(words)],
        folded=[
            Table(
                "Popularity by layer, as a table",
                "Entropy: 1 where all experts are equally popular; reuse: experts of a token that "
                f"the token before used too (by chance {geometry.top_k / geometry.num_experts:.1%}).",
                ["layer", "hottest (share)", "never used", "entropy", "reuse"],
                [rows],
                texts=[1],
            )
        ],
    )
