"""What a page is about: a predictor folder, and the run that it came out of, where there is one."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_beyond.errors import UserError
from moe_beyond.fields import brief
from moe_beyond.pretrained import CONFIG_FILE, find_predictor
from moe_beyond.run_folder import METRICS_FILE, PREDICTOR_FOLDER, RUN_CONFIG_FILE, is_run

SECRET = re.compile(r"(?:.*_)?(?:key|token|password|secret)s?", re.IGNORECASE)
"""Names of what a run's configuration may hold and nobody else shall read."""


@dataclass(frozen=True)
class Subject:
    """A predictor and its run.

    Attributes:
        folder: The predictor's.
        run: The run's, or None.
    """

    folder: Path
    run: Path | None


def find_subject(name: str) -> Subject:
    """Find what a page shall be about.

    Args:
        name: A run's folder, a predictor folder, or a published name.

    Raises:
        UserError: It is none, or a run that exported no predictor.
    """
    if is_run(name):
        folder = Path(name) / PREDICTOR_FOLDER
        if not (folder / CONFIG_FILE).exists():
            raise UserError(
                f"{name}: the run has no {PREDICTOR_FOLDER}/ (its fit did not end, or has no ExportBest); "
                "make one of a checkpoint: moe-beyond package"
            )
        return Subject(folder, Path(name))
    folder = find_predictor(name)
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"{name}: is neither a run (no {RUN_CONFIG_FILE}, no checkpoints) nor a predictor folder")
    above = folder.resolve().parent
    of_run = folder.resolve().name == PREDICTOR_FOLDER and (is_run(above) or (above / METRICS_FILE).exists())
    return Subject(folder, above if of_run else None)


def read_run_config(run: Path) -> dict[str, Any]:
    """Read a run's configuration, with what may be secret left out; nothing where the run keeps none.

    Raises:
        UserError: It cannot be read.
    """
    path = run / RUN_CONFIG_FILE
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({brief(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a run's configuration")
    hidden: dict[str, Any] = _without_secrets(found)
    return hidden


def _without_secrets(found: Any) -> Any:
    if isinstance(found, dict):
        return {
            name: "(not shown)" if isinstance(value, str) and SECRET.fullmatch(str(name)) else _without_secrets(value)
            for name, value in found.items()
        }
    return [_without_secrets(one) for one in found] if isinstance(found, list) else found


def read_curves(run: Path) -> dict[str, list[tuple[float, float]]] | None:
    """Read what a run logged: ``(step, value)`` of each figure, by its name; None where it wrote no CSV.

    Raises:
        UserError: The file is not one that Lightning's CSVLogger writes.
    """
    path = run / METRICS_FILE
    if not path.exists():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return _columns(csv.DictReader(file), path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV file ({error})") from error


def _columns(rows: "csv.DictReader[str]", path: Path) -> dict[str, list[tuple[float, float]]]:
    if "step" not in (rows.fieldnames or ()):
        raise UserError(f"{path}: has no column 'step'; was it written by Lightning's CSVLogger?")
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        given = {name: value for name, value in row.items() if name is not None and value}
        numbers = {name: _number(value, name, f"{path}: line {rows.line_num}") for name, value in given.items()}
        for name, value in numbers.items():
            if name not in ("step", "epoch") and math.isfinite(value) and "step" in numbers:
                found.setdefault(name, []).append((numbers["step"], value))
    return {name: sorted(points) for name, points in found.items()}


def _number(text: str | Sequence[str], name: str, where: str) -> float:
    try:
        return float(str(text))
    except ValueError as error:
        raise UserError(f"{where}: {name} is {text!r}, not a number") from error


def replay_while_fitting(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's configuration says of the replay at its validations; nothing if it had none."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path", "")).split(".")[-1] == "CacheReplay":
            return dict(callback.get("init_args") or {})
    return {}
