"""Every file under configs/ is parsed, and run in miniature (sweeps: see test_sweeps.py)."""

from pathlib import Path

import pytest
from _helpers.common import tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, TINY_TOKEN_CAUSAL, fit

from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.predictors.registry import ARCHITECTURES

TINY_SIZES = {
    "cross_layer": TINY_CROSS_LAYER,
    "token_causal": TINY_TOKEN_CAUSAL,
    "row_encoder": (
        *("--model.width=16", "--model.token_width=16", "--model.layer_width=8", "--model.heads=2", "--model.depth=1"),
        *("--model.feedforward=16", "--model.ngram_buckets=32"),
    ),
    "naive_bayes": (),
    "popularity": (),
    "token_table": (),
    "eamc": ("--model.capacity=4",),
    "history": (),
    "hybrid": (*TINY_CROSS_LAYER, "--model.state_width=8"),
    "next_gate": (),
    "layer_mlp": ("--model.width=8",),
    "pre_attention": ("--model.width=8",),
}
READ_STATES = ("hybrid", "next_gate", "layer_mlp", "pre_attention")


def architecture_of(path: Path) -> str:
    """The predictor that a config fits."""
    name = path.stem.removesuffix("-small")
    return next(architecture for architecture in TINY_SIZES if name.endswith(architecture))


def composed(path: Path) -> list[Path]:
    """A config with the other configs that it needs."""
    if path.parent.name == "experiment":
        return [path]
    if path.parent.name == "zoo":
        return [CONFIGS / "trainer/default.yaml", CONFIGS / "data/traces.yaml", path]
    architecture = architecture_of(path)
    trainer = "counting" if issubclass(ARCHITECTURES[architecture], CountingPredictor) else "default"
    parts = {
        "trainer": CONFIGS / f"trainer/{trainer}.yaml",
        "model": CONFIGS / f"model/{architecture}.yaml",
        "data": CONFIGS / "data/traces.yaml",
    }
    return list(parts.values())


RUNNABLE = sorted(path for folder in ("model", "experiment", "zoo") for path in (CONFIGS / folder).glob("*.yaml"))
"""Those of models run together with those of trainers and data."""


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_a_config_runs(path: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    architecture = architecture_of(path)
    tiny_traces(traces, hidden_states=architecture in READ_STATES)
    words = [word for part in composed(path) for word in ("-c", str(part))]
    run = fit(tmp_path, traces, *words, *TINY_SIZES[architecture], "--trainer.max_epochs=1")
    assert (run / "config.yaml").exists()
    assert read_predictor(run / "predictor").architecture == architecture


def test_every_config_runs_in_some_composition() -> None:
    composed_of = {part for path in RUNNABLE for part in composed(path)}
    assert composed_of == {path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps"}


def test_every_architecture_has_a_config() -> None:
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == set(ARCHITECTURES) == set(TINY_SIZES)
