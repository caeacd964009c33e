"""The parts of a page that say what was fitted, how the fit went, and what figures do not say."""

import itertools
from collections.abc import Sequence
from typing import Any

import yaml

from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.registry import predictor_class
from moe_beyond.report.page.charts import SERIES, Line, axis, line_chart, number, percent
from moe_beyond.report.page.contents import Chart, Section
from moe_beyond.report.page.subject import replay_while_fitting
from moe_beyond.report.results import leaks_of
from moe_beyond.traces.reader import TraceSet

Curves = dict[str, list[tuple[float, float]]]

AVAILABLE = {"routed": "once a layer is routed", "computed": "once a layer is computed"}
WRITERS = {
    "dataset": "read by the model, as a prompt is; not text that it wrote itself",
    "model": "written by the model itself",
    "mixed": "in part read by the model as a prompt, in part written by it",
}
REFERENCES = {"": "s0", "lru_": "lru", "belady_": "belady"}


def predictor_section(config: dict[str, Any], run_config: dict[str, Any]) -> Section:
    """Say what was fitted on what.

    Args:
        config: The predictor folder's.
        run_config: The run's, or nothing.
    """
    training, geometry = config.get("training") or {}, Geometry.from_json(config["geometry"])
    tokenizer, recipe = training.get("tokenizer") or {}, training.get("recipe") or {}
    leaks = leaks_of(0 in config["lookaheads"], config["causal"])
    amount = f"{training['sequences']:,} sequences, {training['tokens']:,} tokens" if "tokens" in training else ""
    bits = training.get("quantization_bits")
    parameters = config.get("parameters")
    facts = {
        "architecture": f"{config['architecture']}: {_summary(config['architecture'])}",
        "model": f"{geometry.model}, {geometry.describe_shape()}",
        "parameters": f"{parameters:,}" if parameters else "none that are learned: it counts",
        "lookaheads": ", ".join(map(str, config["lookaheads"])),
        "knows": f"a score is there {AVAILABLE.get(config['available'], config['available'])}; "
        + (f"LEAK: {', '.join(leaks)}, which no runtime could" if leaks else "causal: no later token is read"),
        "probabilities": f"of a {config['link']}, "
        + ("calibrated by lookahead and layer" if config.get("calibration") else "not calibrated"),
        "training text": f"{training.get('source', 'unknown')}, split {training.get('split', 'unknown')}"
        + (f" ({amount})" if amount else ""),
        "fingerprint": training.get("fingerprint", "unknown"),
        "routed by": f"{training.get('model_id', 'unknown')}" + (f" at {bits:g} bits" if bits else ""),
        "tokenizer": tokenizer.get("name", "unknown"),
        "recipe": ", ".join(f"{name} {value}" for name, value in recipe.items()) or "unknown",
        "arguments": ", ".join(f"{name} {value}" for name, value in config["arguments"].items()) or "none",
        "written by": f"moe_beyond {config.get('tool_version', 'of an unknown version')}",
    }
    listing = yaml.safe_dump(run_config, sort_keys=False, allow_unicode=True) if run_config else None
    return Section(
        "predictor",
        "What was fitted",
        facts=[(name, str(value)) for name, value in facts.items()],
        listing=None if listing is None else ("The run's configuration", listing),
    )


def _summary(architecture: str) -> str:
    return next(iter((predictor_class(architecture).__doc__ or "").splitlines()), "").rstrip(".")


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
        line = _line("loss", loss, "s0", number)
        charts.append(_chart("Training loss", "loss", [line], "The objective on each logged training batch."))
    data = (run_config.get("data") or {}).get("init_args") or {}
    split = f"split {data['val_split']}" if data.get("val_split") else "validation split"
    for figure, title, unit, words in (
        ("recall_at_k", "Recall in validation", "recall@k", percent),
        ("nll", "Likelihood in validation", "NLL, nats a token and layer", number),
    ):
        found = {name: points for name, points in curves.items() if name.startswith(f"val/{figure}/lookahead_")}
        lines = [
            _line(name.removeprefix(f"val/{figure}/lookahead_"), points, style, words)
            for (name, points), style in zip(found.items(), itertools.cycle(SERIES), strict=False)
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
    for figure, title, unit, words in (
        ("hit_rate", "Hits in validation", "hit rate", percent),
        ("bytes_ratio", "Bytes in validation", "bytes moved / demanded", number),
    ):
        names = {"": "predictor", "lru_": "LRU", "belady_": "Belady"}
        lines = [
            _line(names[prefix], curves[f"val/{prefix}{figure}"], style, words)
            for prefix, style in REFERENCES.items()
            if f"val/{prefix}{figure}" in curves
        ]
        if lines:
            charts.append(
                _chart(title, unit, lines, f"Predictor: {what}; LRU and Belady at the same budget, no prefetch.")
            )
    return charts


def _line(name: str, points: Sequence[tuple[float, float]], style: str, words: Any) -> Line:
    return Line(name, tuple(points), style, tuple(f"step {step:,.0f}: {_told(value, words)}" for step, value in points))


def _told(value: float, words: Any) -> str:
    return f"{value:.1%}" if words is percent else f"{value:.4g}"


def _chart(title: str, unit: str, lines: Sequence[Line], caption: str) -> Chart:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    shares = any("%" in told for line in lines for told in line.told)
    x = axis("step", steps, whole=True)
    y = axis(unit, values, words=percent if shares else number)
    return Chart(title, line_chart(f"{title}: {unit} by step", x, y, lines), caption)


def limits_section(
    traces: TraceSet, config: dict[str, Any], *, warmup_tokens: int, devices: Sequence[str], profile: str | None
) -> Section:
    """Say what the figures mean, and what they do not say.

    Args:
        traces: What was measured on.
        config: The predictor folder's.
        warmup_tokens: What does not count in replays.
        devices: Names of those that times are for.
        profile: The published history that `belief` used, or None.
    """
    manifest = traces.manifest
    geometry = traces.geometry
    lookaheads = config["lookaheads"]
    ahead = [str(h) for h in lookaheads if isinstance(h, int) and h > 0]
    when = [
        *([f"{', '.join(ahead)}: once the layer so many before it was routed, by the same token"] if ahead else []),
        *(["0 (LEAK): it reads the router's own input, when the router has decided"] if 0 in lookaheads else []),
        *(["token: before the token's first layer"] if "token" in lookaheads else []),
        *(
            ["next: once the layer of the token before was routed, when the next token's id is not known; such scores "
             "say what to keep, not what to fetch"]
            if "next" in lookaheads
            else []
        ),
    ]  # fmt: skip
    facts = {
        "recall@k": f"the share of the {geometry.top_k} experts that the router chose which are among the "
        f"{geometry.top_k} scored best, over all tokens of the traces, averaged over layers. Per-label accuracy is not "
        f"shown: naming no expert at all is {1 - geometry.top_k / geometry.num_experts:.1%} accurate",
        "lookahead": f"when a score is there. {'; '.join(when)}",
        "the text": f"{WRITERS.get(manifest.author, manifest.author)}. Other text routes otherwise: on another domain, "
        "and on what the model writes itself, expect less",
        "hits": "experts that were in the cache when their layer began. Every sequence starts with an empty cache. "
        + (f"The first {warmup_tokens:,} tokens of each are replayed but not counted. " if warmup_tokens else "")
        + "Without a device there is no time: whatever is prefetched arrives before it is needed",
        "bytes": "all transfers, ahead of demand or on demand, over the experts demanded: 1.00 moves one expert for "
        "every access. A higher hit rate for more bytes can be the slower one",
        "clairvoyant": "belady, static_hindsight and clairvoyant prefetch know these very traces in advance, which no "
        "runtime does. Belady is the optimum without prefetch over whole sequences; static_hindsight the best "
        "fixed choice of experts; clairvoyant prefetch brings in what is missing next, near the optimum and no bound",
        "belief": (
            f"it knows besides how experts were used in training text ({profile})"
            if profile
            else "no published history is for this model and tokenizer: a table counted on another model stands in, "
            "and all experts count as equally popular"
        ),
        "times": f"of a clock that was not measured on a machine ({', '.join(devices)}): one link with bandwidth, "
        "latency and a queue, computing at the memory's bandwidth, MoE layers alone. It compares strategies; "
        "it does not promise a speed",
        "expert ids": "hold for this checkpoint of the model, its tokenizer and its quantisation alone",
        "harm": "none to the model's answers: the router chooses, a wrong prediction costs time alone",
    }
    if not devices:
        del facts["times"]
    return Section("limits", "What the figures do not say", facts=list(facts.items()))
