"""Fitting through the command line, tiny, with the shipped configs."""

import os
from dataclasses import dataclass
from pathlib import Path

from moe_beyond.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_TOKEN_CAUSAL = (
    "--model.width=16", "--model.heads=2", "--model.depth=1", "--model.window=8",
)  # fmt: skip
TINY_CROSS_LAYER = (*TINY_TOKEN_CAUSAL, "--model.layer_width=16")


@dataclass(frozen=True)
class Run:
    """A finished fit: its folder, and its trace set."""

    folder: Path
    traces: Path


def fit(folder: Path, traces: Path, *words: str) -> Path:
    """Fit in ``folder`` with the shipped configs and return the run's folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "-c", str(CONFIGS / "data/traces.yaml"), f"--data.traces={traces}", *words]) == 0
    finally:
        os.chdir(before)
    return next(folder.glob("runs/*/version_0"))
