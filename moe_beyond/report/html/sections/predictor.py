"""The section on the predictor: architecture, training data and settings."""

from typing import Any

import yaml

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.report.html.page import Section
from moe_beyond.report.labels import leaks_of


def predictor_section(config: dict[str, Any], run_config: dict[str, Any]) -> Section:
    """Describe the predictor and its training data.

    Args:
        config: Configuration of the predictor folder, with ``lookaheads`` and ``causal`` of its source.
        run_config: Configuration of the run; empty without a run.
    """
    training, geometry = config.get("training") or {}, Geometry.from_json(config["geometry"])
    tokenizer, recipe = training.get("tokenizer") or {}, training.get("recipe") or {}
    leaks = leaks_of(0 in config["lookaheads"], config["causal"])
    amount = f" ({training['sequences']:,} sequences, {training['tokens']:,} tokens)" if "tokens" in training else ""
    bits = training.get("quantization_bits")
    parameters = config.get("parameters")
    facts = {
        "architecture": f"{config['architecture']}: {_summary(config['architecture'])}",
        "model": f"{geometry.model}, {geometry.describe_shape()}",
        "parameters": f"{parameters:,}" if parameters else "none: the predictor counts",
        "lookaheads": ", ".join(map(str, config["lookaheads"])),
        "information": f"LEAK: {' and '.join(leaks)}, which no runtime can"
        if leaks
        else "causal: reads no later token",
        "probabilities": f"{config['activation']}, "
        + ("calibrated per lookahead and layer" if config.get("calibration") else "not calibrated"),
        "training text": f"{training.get('source', 'unknown')}, split {training.get('split', 'unknown')}{amount}",
        "fingerprint": training.get("fingerprint", "unknown"),
        "recorded from": f"{training.get('model_id', 'unknown')}" + (f" at {bits:g} bits" if bits else ""),
        "tokenizer": tokenizer.get("name", "unknown"),
        "recipe": ", ".join(f"{name} {value}" for name, value in recipe.items()) or "unknown",
        "arguments": ", ".join(f"{name} {value}" for name, value in config["arguments"].items()) or "none",
        "written by": f"moe_beyond {config.get('tool_version', '(unknown version)')}",
    }
    listing = yaml.safe_dump(run_config, sort_keys=False, allow_unicode=True) if run_config else None
    return Section(
        "predictor",
        "Predictor",
        facts=[(name, str(value)) for name, value in facts.items()],
        listing=None if listing is None else ("Configuration of the run", listing),
    )


def _summary(architecture: str) -> str:
    """Return the first line of an architecture's docstring."""
    return next(iter((ARCHITECTURES[architecture].__doc__ or "").splitlines()), "").rstrip(".").replace("`", "")
