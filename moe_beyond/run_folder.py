"""The layout of a run's folder, which `moe-beyond fit` writes.

```
runs/NAME/version_0/
  config.yaml      the resolved configuration
  metrics.csv      the logged figures
  checkpoints/     Lightning's checkpoints, for resuming
  predictor/       the exported predictor folder
  scores/          the scores that `moe-beyond predict` writes
```
"""

from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.safe_text import shown
from moe_beyond.yaml_files import read_yaml_mapping

__all__ = [
    "CHECKPOINTS_FOLDER",
    "INTERRUPTED_CHECKPOINT",
    "METRICS_FILE",
    "PREDICTOR_FOLDER",
    "RUN_CONFIG_FILE",
    "SCORES_FOLDER",
    "checkpoints_of",
    "is_run",
    "read_run_config",
    "run_of",
]

RUN_CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
CHECKPOINTS_FOLDER = "checkpoints"
PREDICTOR_FOLDER = "predictor"
SCORES_FOLDER = "scores"
INTERRUPTED_CHECKPOINT = "interrupted.ckpt"


def is_run(folder: str | Path) -> bool:
    """Return whether a folder is a run's folder: it has a configuration or checkpoints."""
    return (Path(folder) / RUN_CONFIG_FILE).exists() or any(Path(folder).glob("checkpoints/*.ckpt"))


def read_run_config(run: str | Path) -> dict[str, Any] | None:
    """Read the configuration of a run; None if it has none.

    Args:
        run: Folder of the run.

    Raises:
        UserError: The file is not a run's configuration.
    """
    path = Path(run) / RUN_CONFIG_FILE
    if not path.exists():
        return None
    config = read_yaml_mapping(path)
    for name in ("data", "model", "trainer"):
        group = config.get(name) or {}
        arguments = group.get("init_args") or {} if isinstance(group, dict) else None
        if not isinstance(arguments, dict):
            raise UserError(f"{path}: {name} must be a mapping of options (got {shown(group)}); restore the file")
    return config


def checkpoints_of(run: str | Path) -> list[Path]:
    """Return the checkpoints of a run, without those in hidden folders, which are still being written."""
    paths = (path for path in Path(run).rglob("*.ckpt") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(run).parts)]


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote a checkpoint; without a configuration, the checkpoint's own folder."""
    nearby = (checkpoint.parent.parent, checkpoint.parent)
    return next((folder for folder in nearby if (folder / RUN_CONFIG_FILE).exists()), checkpoint.parent)
