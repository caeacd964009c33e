"""The subject of a page: a predictor folder, and the run that it belongs to, if any."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.pretrained import CONFIG_FILE, find_predictor
from moe_beyond.run_folder import METRICS_FILE, PREDICTOR_FOLDER, RUN_CONFIG_FILE, is_run, read_run_config
from moe_beyond.urls import without_secrets

SECRET = re.compile(r"(?:.*_)?(?:key|token|password|secret)s?", re.IGNORECASE)
"""Names of settings in a run's configuration that a page must not show."""


@dataclass(frozen=True)
class Subject:
    """A predictor and its run.

    Attributes:
        folder: Folder with the predictor.
        run: Folder of the run; None for a predictor folder outside a run.
    """

    folder: Path
    run: Path | None


def find_subject(name: str) -> Subject:
    """Find the predictor of a page, and its run.

    Args:
        name: Folder of a run, a predictor folder, or the name of a pretrained predictor.

    Raises:
        UserError: No such folder or predictor, or the run has no exported predictor.
    """
    if is_run(name):
        folder = Path(name) / PREDICTOR_FOLDER
        if not (folder / CONFIG_FILE).exists():
            raise UserError(
                f"{name}: the run has no {PREDICTOR_FOLDER}/ (the fit did not end, or has no ExportBest callback); "
                "make one from a checkpoint with moe-beyond package"
            )
        return Subject(folder, Path(name))
    folder = find_predictor(name)
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{name}: neither a run (no {RUN_CONFIG_FILE}, no checkpoints) nor a predictor folder; name one of them"
        )
    parent = folder.resolve().parent
    in_run = folder.resolve().name == PREDICTOR_FOLDER and (is_run(parent) or (parent / METRICS_FILE).exists())
    return Subject(folder, parent if in_run else None)


def run_config_to_show(run: Path) -> dict[str, Any]:
    """Read a run's configuration without its secrets; empty if the run has none.

    Raises:
        UserError: The file cannot be read.
    """
    shown: dict[str, Any] = _without_secrets(read_run_config(run) or {})
    return shown


def _without_secrets(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            name: "(not shown)" if isinstance(value, str) and SECRET.fullmatch(str(name)) else _without_secrets(value)
            for name, value in config.items()
        }
    if isinstance(config, list):
        return [_without_secrets(value) for value in config]
    return without_secrets(config) if isinstance(config, str) else config


def read_curves(run: Path) -> dict[str, list[tuple[float, float]]] | None:
    """Read the metrics that a run logged.

    Returns:
        Metric -> ``(step, value)`` of each logged value; None if the run has no metrics.csv.

    Raises:
        UserError: The file was not written by Lightning's CSVLogger.
    """
    path = run / METRICS_FILE
    if not path.exists():
        return None
    if not path.is_file():  # reading a pipe may never end
        raise UserError(f"{path}: is not a regular file; restore the file or delete it")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return _columns(csv.DictReader(file), path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV file ({error}); restore the file or delete it") from error


def _columns(rows: "csv.DictReader[str]", path: Path) -> dict[str, list[tuple[float, float]]]:
    if "step" not in (rows.fieldnames or ()):
        raise UserError(f"{path}: has no column 'step'; use the file of Lightning's CSVLogger")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        cells = {name: value for name, value in row.items() if name is not None and value}
        numbers = {name: _number(value, name, f"{path}: line {rows.line_num}") for name, value in cells.items()}
        for name, value in numbers.items():
            if name not in ("step", "epoch") and math.isfinite(value) and "step" in numbers:
                curves.setdefault(name, []).append((numbers["step"], value))
    return {name: sorted(points) for name, points in curves.items()}


def _number(text: str | Sequence[str], name: str, location: str) -> float:
    try:
        return float(str(text))
    except ValueError as error:
        raise UserError(f"{location}: {name} is not a number (got {text!r}); restore the file or delete it") from error


def validation_replay(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the `CacheReplay` callback in a run's configuration; empty if there is none."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path", "")).split(".")[-1] == "CacheReplay":
            settings = callback.get("init_args")
            return settings if isinstance(settings, dict) else {}
    return {}
