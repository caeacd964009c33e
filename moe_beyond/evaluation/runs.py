"""All checkpoints of a run, those saved between validations too, on equal terms."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_beyond.errors import UserError
from moe_beyond.evaluation.evaluate import Evaluation
from moe_beyond.evaluation.sources import ScoreSource, from_predictor
from moe_beyond.predictors.checkpoint import load_checkpoint

CONFIG_FILE = "config.yaml"
EXPORTED = "predictor"
"""Of a run's folder, where its predictor lies."""

COPIES = ("last", "interrupted")
"""What the names of checkpoints begin with that may be second copies of others."""


@dataclass(frozen=True)
class CheckpointEvaluation:
    """One checkpoint's figures: its file's name, when it was saved, and what was found."""

    checkpoint: str
    epoch: int
    step: int
    evaluation: Evaluation


def is_run(folder: str | Path) -> bool:
    """Tell whether a folder is that of a run: it keeps a configuration or checkpoints."""
    return (Path(folder) / CONFIG_FILE).exists() or any(Path(folder).glob("checkpoints/*.ckpt"))


def validation_data(run: str | Path) -> tuple[str, str]:
    """Return the trace set and the split that a run validated on, from its configuration.

    Raises:
        UserError: There is no configuration, or the run had no validation.
    """
    path = Path(run) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{path}: not found; name the trace set with --traces")
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data", {}).get("init_args", {})
    if not data.get("val_split"):
        raise UserError(f"{run}: the run had no validation; name a trace set with --traces")
    return data.get("val_traces") or data["traces"], data["val_split"]


def checkpoints_of(run: str | Path) -> list[Path]:
    """List the checkpoints of a run; what is being written, under a hidden name, is none yet."""
    return [path for path in Path(run).rglob("*.ckpt") if not path.name.startswith(".")]


def resumed_from(run: str | Path) -> Path | None:
    """Return the checkpoint that a run went on from, as its configuration names it; None for none, or none any more."""
    path = Path(run) / CONFIG_FILE
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
        earlier = resumed.parent.parent if resumed.parent.name == "checkpoints" else resumed.parent
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
        tokenizer = checkpoint.training.get("tokenizer", {}).get("sha256")
        source = from_predictor(checkpoint.predictor, path.stem, tokenizer_sha256=tokenizer)
        yield CheckpointEvaluation(path.name, checkpoint.epoch, checkpoint.step, evaluating(source))
