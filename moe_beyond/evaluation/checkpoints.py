"""Runs of a fit: their folders, their predictor, and the evaluation of all their checkpoints on equal terms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.resolve import resolve_grid, resolve_settings, resolve_text
from moe_beyond.evaluation.results import CheckpointEvaluation, Progress
from moe_beyond.evaluation.run import measured_replay
from moe_beyond.evaluation.sources import ScoreSource, from_predictor, from_predictor_folder
from moe_beyond.geometry import Geometry
from moe_beyond.messages import notify
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.io.checkpoint import Checkpoint, load_checkpoint
from moe_beyond.predictors.io.folder import read_config, read_predictor
from moe_beyond.predictors.training_text import MeasuredText
from moe_beyond.pretrained import CONFIG_FILE as PREDICTOR_CONFIG
from moe_beyond.pretrained import find_predictor
from moe_beyond.run_folder import (
    PREDICTOR_FOLDER,
    RUN_CONFIG_FILE,
    checkpoints_of,
    is_run,
    read_run_config,
    run_of,
)
from moe_beyond.traces.reader import TraceSet

COPIES = ("last", "interrupted")
"""Prefixes of the names of checkpoints that may be second copies of others."""


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluation of all checkpoints of a run.

    Attributes:
        measured_on: Split, and relation of its text to the run's training text.
        geometry: Geometry of the model.
        checkpoints: One evaluation per checkpoint, in the order of their steps.
    """

    measured_on: MeasuredText
    geometry: Geometry
    checkpoints: Sequence[CheckpointEvaluation]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        return {
            "measured_on": self.measured_on.to_json(),
            "checkpoints": [checkpoint.to_json() for checkpoint in self.checkpoints],
        }


def find_trained(name: str) -> Path:
    """Find the predictor of a name; the predictor of a run is printed to standard error.

    The predictor of a run is the exported one, otherwise the best checkpoint, otherwise the last one.

    Args:
        name: Folder of a run, predictor folder, pretrained name, or ``hf:ORG/REPO``.

    Returns:
        A predictor folder, or a checkpoint of the run.

    Raises:
        UserError: There is no predictor of this name, or the run has neither predictor nor checkpoints.
    """
    folder = Path(name)
    if not is_run(folder) or (folder / PREDICTOR_CONFIG).exists():
        return find_predictor(name)
    trained = folder / PREDICTOR_FOLDER
    if not (trained / PREDICTOR_CONFIG).exists():
        if not (files := checkpoints_of(folder)):
            raise UserError(f"{name}: has no checkpoint (*.ckpt); name a run that has one")
        last = max(files, key=lambda path: (load_checkpoint(path).step, path.stem.startswith(COPIES), path.name))
        best = load_checkpoint(last).best
        trained = next((path for path in files if path.name == best), last)
    notify(f"{name} is a run: its predictor is {trained}")
    return trained


def load_trained(path: Path) -> tuple[Predictor, dict[str, Any]]:
    """Load a predictor folder or a checkpoint.

    Args:
        path: Path that `find_trained` returned.

    Returns:
        The predictor, and the record of its training.

    Raises:
        UserError: The folder or the checkpoint is damaged.
    """
    if path.is_dir():
        return read_predictor(path), read_config(path).get("training") or {}
    checkpoint = load_checkpoint(path)
    return checkpoint.predictor, checkpoint.training


def find_source(name: str) -> ScoreSource:
    """Score with the predictor of a name (`find_trained`).

    Raises:
        UserError: There is no predictor of this name, or it is damaged.
    """
    path = find_trained(name)
    return from_predictor_folder(path) if path.is_dir() else _checkpoint_source(load_checkpoint(path))


def _checkpoint_source(checkpoint: Checkpoint, name: str | None = None) -> ScoreSource:
    tokenizer = (checkpoint.training.get("tokenizer") or {}).get("sha256")
    predictor = checkpoint.predictor
    return from_predictor(predictor, name or predictor.architecture, tokenizer_sha256=tokenizer)


def validation_data(run: str | Path) -> tuple[str, str]:
    """Return the trace set and the split that a run validated on, by its configuration.

    Raises:
        UserError: There is no readable configuration, or the run had no validation.
    """
    path, config = Path(run) / RUN_CONFIG_FILE, read_run_config(run)
    if config is None:
        raise UserError(f"{path}: is missing; name the trace set with --traces")
    data = (config.get("data") or {}).get("init_args") or {}
    if not data.get("val_split"):
        raise UserError(f"{run}: the run had no validation; name a trace set with --traces")
    traces, split = data.get("val_traces") or data.get("traces"), data["val_split"]
    if not isinstance(traces, str) or not isinstance(split, str):
        raise UserError(f"{path}: traces and val_split must be text; restore the file, or name the set with --traces")
    return traces, split


def resumed_from(run: str | Path) -> Path | None:
    """Return the checkpoint that a run resumed, by its configuration; None without one, or if it was deleted.

    Raises:
        UserError: The configuration cannot be read.
    """
    named = (read_run_config(run) or {}).get("ckpt_path")
    return Path(named) if isinstance(named, str) and Path(named).is_file() else None


def checkpoints_of_fit(run: str | Path) -> dict[Path, int]:
    """List the checkpoints of a fit with their steps: those of a run, and those of the resumed runs up to that point.

    Args:
        run: Folder of the fit's last run.
    """
    # Only the steps are kept: each checkpoint is loaded again when it is evaluated, one at a time.
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


def evaluate_run(
    options: ReplayOptions,
    run: str | Path,
    *,
    traces: TraceSet | None = None,
    split: str | None = None,
    progress: Progress | None = None,
    workers: int = 1,
) -> RunEvaluation:
    """Evaluate the checkpoints of a run, and those of the runs that it resumed.

    Strategies select by the first lookahead, which is enough to compare checkpoints, unless the options name others.

    Args:
        options: Options of the replay.
        run: Folder of the run.
        traces: Trace set (default: the validation data of the run).
        split: Name of a split, or ``all`` (default: the validation split of the run; with ``traces``, one that the
            run was not fitted on, if any).
        progress: Function that receives the finished and the total number of tokens of all checkpoints (default: no
            progress).
        workers: Number of processes (default: 1).

    Raises:
        UserError: There is no checkpoint, one cannot be read, or an option cannot be read.
    """
    if traces is None:
        folder, val_split = validation_data(run)
        traces, split = TraceSet(folder), split or val_split
    shared = resolve_settings(options, traces)
    paths = _distinct_checkpoints(run)
    text: MeasuredText | None = None
    evaluations = []
    for number, path in enumerate(paths):
        checkpoint = load_checkpoint(path)
        source = _checkpoint_source(checkpoint, path.stem)
        if text is None:  # all checkpoints of a run have the same training text
            text = resolve_text(traces, split, shared, [replace(source, name="the run")])
        settings = resolve_grid(options, traces, shared, source, source.lookaheads[:1])
        outcome = measured_replay(traces, text, settings, source, shared).run(
            _part(progress, number, len(paths)), workers
        )
        evaluations.append(CheckpointEvaluation(path.name, checkpoint.epoch, checkpoint.step, outcome.evaluation))
    assert text is not None
    return RunEvaluation(text, traces.geometry, evaluations)


def _distinct_checkpoints(run: str | Path) -> list[Path]:
    """List the checkpoints of a fit in the order of their steps, without second copies.

    Raises:
        UserError: There is no checkpoint, or one cannot be read.
    """
    steps = checkpoints_of_fit(run)
    if not steps:
        raise UserError(f"{run}: has no checkpoint (*.ckpt); name a run that has one")
    paths: list[Path] = []
    for path in sorted(steps, key=lambda path: (steps[path], path.stem.startswith(COPIES), path.name)):
        if not path.stem.startswith(COPIES) or steps[path] not in {steps[other] for other in paths}:
            paths.append(path)
    return paths


def _part(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Report the progress of one of several equal parts as progress of all."""
    if progress is None:
        return None
    report = progress
    return lambda done, total: report(number * total + done, parts * total)
