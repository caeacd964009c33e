"""The parts of a page that say what was fitted, and what figures do not say."""

from collections.abc import Sequence
from typing import Any

import yaml

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.report.html.model import Section
from moe_beyond.report.tables.results import leaks_of
from moe_beyond.traces.reader import TraceSet

AVAILABLE = {"routed": "once a layer is routed", "computed": "once a layer is computed"}
WRITERS = {
    "dataset": "read by the model, as a prompt is; not text that it wrote itself",
    "model": "written by the model itself",
    "mixed": "in part read by the model as a prompt, in part written by it",
}


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
        "knows": f"a score is there {AVAILABLE.get(config['available_after'], config['available_after'])}; "
        + (f"LEAK: {', '.join(leaks)}, which no runtime could" if leaks else "causal: no later token is read"),
        "probabilities": f"of a {config.get('link', 'link unknown')}, "
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
    return next(iter((ARCHITECTURES[architecture].__doc__ or "").splitlines()), "").rstrip(".")


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
        "hits": "experts that were in the cache when their layer began. Every sequence starts with an empty cache, "
        "and every token is a step, those of a prompt too. "
        + (f"The first {warmup_tokens:,} tokens of each are replayed but not counted. " if warmup_tokens else "")
        + "Without a device there is no time: whatever is prefetched arrives before it is needed",
        "bytes": "all transfers, ahead of demand or on demand, over the experts demanded: 1.00 moves one expert for "
        "every access. A higher hit rate for more bytes can be the slower one",
        "clairvoyant": "belady, static_hindsight and clairvoyant prefetch know these very traces in advance, which no "
        "runtime does. Belady is the optimum without prefetch over whole sequences of all that must take in what is "
        "demanded; static_hindsight the best "
        "fixed choice of experts; clairvoyant prefetch brings in what is missing next, near the optimum and no bound",
        "belief": (
            f"it knows besides how experts were used in training text ({profile})"
            if profile
            else "no published history is for this model and tokenizer: a table counted on another model stands in, "
            "and all experts count as equally popular"
        ),
        "times": f"of a clock that was not measured on a machine ({', '.join(devices)}): one link with bandwidth, "
        "latency and a queue, computing at the memory's nominal bandwidth, MoE layers only: an upper bound. It "
        "compares strategies; it does not promise a speed",
        "expert ids": "hold for this checkpoint of the model, its tokenizer and its quantisation alone",
        "harm": "none to the model's answers: the router chooses, a wrong prediction costs time alone",
    }
    if not devices:
        del facts["times"]
    return Section("limits", "What the figures do not say", facts=list(facts.items()))
