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


def evaluate_run(run: str | Path, evaluating: Callable[[ScoreSource], Evaluation]) -> Iterator[CheckpointEvaluation]:
    """Evaluate a run's checkpoints in the order of their steps.

    Args:
        run: Its folder.
        evaluating: Evaluates one of them.

    Raises:
        UserError: There is no checkpoint, or one cannot be read.
    """
    files = checkpoints_of(run)
    if not files:
        raise UserError(f"{run}: holds no checkpoint (*.ckpt)")
    steps = {path: load_checkpoint(path).step for path in files}  # loaded twice, so that one at a time is in memory
    seen: set[int] = set()
    for path in sorted(files, key=lambda path: (steps[path], path.stem.startswith("last"), path.name)):
        if steps[path] in seen and path.stem.startswith("last"):  # Lightning's second copy of the newest one
            continue
        seen.add(steps[path])
        checkpoint = load_checkpoint(path)
        tokenizer = checkpoint.training.get("tokenizer", {}).get("sha256")
        source = from_predictor(checkpoint.predictor, path.stem, tokenizer_sha256=tokenizer)
        yield CheckpointEvaluation(path.name, checkpoint.epoch, checkpoint.step, evaluating(source))
