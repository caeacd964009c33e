"""Where the weights that ship with this package lie."""

from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError, unknown
from moe_beyond.files import read_json

CONFIG_FILE = "config.json"


def checkpoints_folder() -> Path:
    """Return the folder ``checkpoints/``: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    inside = package / "checkpoints"
    return inside if inside.is_dir() else package.parent / "checkpoints"


def published_predictors() -> list[str]:
    """List the names of the predictors that ship with this package: ``architecture.model-data[-size]``."""
    return sorted(path.parent.name for path in checkpoints_folder().glob(f"*.*/{CONFIG_FILE}"))


def published_figures() -> list[dict[str, Any]]:
    """Describe the published predictors: name, size, architecture, lookaheads, and what evaluations were recorded."""
    found = []
    for name in published_predictors():
        folder = checkpoints_folder() / name
        config = read_json(folder / CONFIG_FILE)
        found.append(
            {
                "name": name,
                "architecture": config["architecture"],
                "parameters": config.get("parameters"),
                "bytes": sum(path.stat().st_size for path in folder.iterdir()),
                "lookaheads": config["lookaheads"],
                "figures": config.get("figures", []),
            }
        )
    return found


def find_predictor(name: str) -> Path:
    """Find a predictor folder.

    Args:
        name: A folder, or a published name.

    Raises:
        UserError: It is neither, or both.
    """
    folder, names = Path(name), published_predictors()
    if name not in names:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{name}: is a file, not a predictor folder; make one of a checkpoint: moe-beyond package")
        if "/" in name:
            raise UserError(f"{name}: there is no such folder")
        raise unknown("predictor (neither a folder nor a published name)", name, names)
    published = checkpoints_folder() / name
    if folder.exists() and folder.resolve() != published.resolve():
        raise UserError(f"{name!r} is both a folder here and a published name; write ./{name} or {published}")
    return published
