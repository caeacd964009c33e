"""All checkpoints of a run, those saved between validations too, on equal terms."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_beyond.errors import UserError
from moe_beyond.evaluation.run import Evaluation
from moe_beyond.evaluation.sources import ScoreSource, from_predictor, from_predictor_folder
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.io.checkpoint import Checkpoint, load_checkpoint
from moe_beyond.predictors.io.folder import read_config, read_predictor
from moe_beyond.pretrained import CONFIG_FILE as PREDICTOR_CONFIG
from moe_beyond.pretrained import find_predictor
from moe_beyond.run_folder import PREDICTOR_FOLDER, RUN_CONFIG_FILE, checkpoints_of, is_run, run_of

COPIES = ("last", "interrupted")
"""Beginnings of the names of checkpoints that may be second copies of others."""


@dataclass(frozen=True)
class CheckpointEvaluation:
    """One checkpoint's figures: its file's name, when it was saved, and what was found."""

    checkpoint: str
    epoch: int
    step: int
    evaluation: Evaluation


def find_trained(name: str) -> Path:
    """Find the predictor that a name refers to; for a run, say on standard error which part of it that is.

    A run refers to the predictor that it exported, otherwise to its best checkpoint, otherwise to its last.

    Args:
        name: A run's folder, a predictor folder, a published name, or ``hf:ORG/REPO``.

    Returns:
        A predictor folder, or a checkpoint of the run.

    Raises:
        UserError: It is none of them, or a run without a predictor and without checkpoints.
    """
    folder = Path(name)
    if not is_run(folder) or (folder / PREDICTOR_CONFIG).exists():
        return find_predictor(name)
    trained = folder / PREDICTOR_FOLDER
    if not (trained / PREDICTOR_CONFIG).exists():
        if not (files := checkpoints_of(folder)):
            raise UserError(f"{name}: holds no checkpoint (*.ckpt)")
        last = max(files, key=lambda path: (load_checkpoint(path).step, path.stem.startswith(COPIES), path.name))
        best = load_checkpoint(last).best
        trained = next((path for path in files if path.name == best), last)
    print(f"{name} is a run: its predictor is {trained}", file=sys.stderr)
    return trained


def load_trained(path: Path) -> tuple[Predictor, dict[str, Any]]:
    """Load what `find_trained` found.

    Returns:
        The predictor, ready to score, and what is recorded of its training.

    Raises:
        UserError: It is damaged.
    """
    if path.is_dir():
        return read_predictor(path), read_config(path).get("training") or {}
    checkpoint = load_checkpoint(path)
    return checkpoint.predictor, checkpoint.training


def find_source(name: str) -> ScoreSource:
    """Score with the predictor that a name refers to (`find_trained`).

    Raises:
        UserError: There is no such predictor, or it is damaged.
    """
    path = find_trained(name)
    return from_predictor_folder(path) if path.is_dir() else _of_checkpoint(load_checkpoint(path))


def _of_checkpoint(checkpoint: Checkpoint, name: str | None = None) -> ScoreSource:
    tokenizer = checkpoint.training.get("tokenizer", {}).get("sha256")
    predictor = checkpoint.predictor
    return from_predictor(predictor, name or predictor.architecture, tokenizer_sha256=tokenizer)


def validation_data(run: str | Path) -> tuple[str, str]:
    """Return the trace set and the split that a run validated on, from its configuration.

    Raises:
        UserError: There is no configuration, or the run had no validation.
    """
    path = Path(run) / RUN_CONFIG_FILE
    if not path.exists():
        raise UserError(f"{path}: not found; name the trace set with --traces")
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data", {}).get("init_args", {})
    if not data.get("val_split"):
        raise UserError(f"{run}: the run had no validation; name a trace set with --traces")
    return data.get("val_traces") or data["traces"], data["val_split"]


def resumed_from(run: str | Path) -> Path | None:
    """Return the checkpoint that a run went on from, as its configuration names it; None for none, or none any more."""
    path = Path(run) / RUN_CONFIG_FILE
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    named = config.get("ckpt_path") if isinstance(config, dict) else None
    return Path(named) if isinstance(named, str) and Path(named).exists() else None


def checkpoints_of_fit(run: str | Path) -> dict[Path, int]:
    """List the checkpoints of a fit with their steps: those of a run, and of the runs it resumed, until it did.

    Args:
        run: Folder of the fit's last run.
    """
    # Loaded here and evaluated later, so that one at a time is in memory.
    steps = {path: load_checkpoint(path).step for path in checkpoints_of(run)}
    seen, resumed = {Path(run).resolve()}, resumed_from(run)
    while resumed is not None:
        earlier = run_of(resumed)
        if earlier.resolve() in seen:
            break
        last = load_checkpoint(resumed).step
        before = {path: load_checkpoint(path).step for path in checkpoints_of(earlier)}
        steps |= {path: step for path, step in before.items() if step <= last}
        seen.add(earlier.resolve())
        resumed = resumed_from(earlier)
    return steps


def evaluate_run(run: str | Path, evaluating: Callable[[ScoreSource], Evaluation]) -> Iterator[CheckpointEvaluation]:
    """Evaluate a run's checkpoints, and those of the runs that it resumed, in the order of their steps.

    Args:
        run: Its folder.
        evaluating: Evaluates one of them.

    Raises:
        UserError: There is no checkpoint, or one cannot be read.
    """
    steps = checkpoints_of_fit(run)
    if not steps:
        raise UserError(f"{run}: holds no checkpoint (*.ckpt)")
    seen: set[int] = set()
    for path in sorted(steps, key=lambda path: (steps[path], path.stem.startswith(COPIES), path.name)):
        if steps[path] in seen and path.stem.startswith(COPIES):
            continue
        seen.add(steps[path])
        checkpoint = load_checkpoint(path)
        source = _of_checkpoint(checkpoint, path.stem)
        yield CheckpointEvaluation(path.name, checkpoint.epoch, checkpoint.step, evaluating(source))
