"""Predictors and models that ship with this project, and the user's own predictor folders, by name."""

import os
from pathlib import Path
from typing import Any

from moe_beyond.download import (
    PREFIX,
    REPOSITORY,
    HubName,
    download,
    is_hub_name,
    near_path,
    no_such_file,
    parse_hub_name,
)
from moe_beyond.errors import UserError, unknown
from moe_beyond.files import file_sha256, read_json
from moe_beyond.messages import notify
from moe_beyond.predictor_config import check_config

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
"""Files of a predictor folder."""
CHECKPOINTS_VARIABLE = "MOE_BEYOND_CHECKPOINTS"
"""Environment variable with a folder of pretrained predictors, such as ``checkpoints/`` of a clone."""
LARGE = {
    "cross_layer.deepseek-v2-lite-puffin": 24_464_398,
    "token_causal.deepseek-v2-lite-puffin": 8_676_202,
    "cross_layer.small-moe-python": 1_608_696,
}
"""Pretrained predictors whose weights a wheel leaves out -> size of the weights in bytes."""


class NotInstalledError(UserError):
    """The weights of a pretrained predictor are not on this machine."""


def checkpoint_folders() -> list[Path]:
    """Return the folders that are searched for pretrained predictors and bundled models, the first one first.

    These are the folder that ``MOE_BEYOND_CHECKPOINTS`` names, and ``checkpoints/`` of the installed package or clone.

    Raises:
        UserError: ``MOE_BEYOND_CHECKPOINTS`` names no folder.
    """
    package = Path(__file__).parent
    installed = package / "checkpoints"
    folders = [installed if installed.is_dir() else package.parent / "checkpoints"]
    if named := os.environ.get(CHECKPOINTS_VARIABLE):
        if not Path(named).is_dir():
            raise UserError(f"{CHECKPOINTS_VARIABLE}: folder not found (got {named}); name checkpoints/ of a clone")
        folders.insert(0, Path(named))
    return [folder.resolve() for folder in folders]


def shipped_folders() -> dict[str, Path]:
    """Return the folders of pretrained predictors and bundled models, by name; folders with weights take precedence."""
    folders: dict[str, Path] = {}
    for parent in checkpoint_folders():
        for folder in (path.parent for path in sorted(parent.glob(f"*/{CONFIG_FILE}"))):
            if folder.name not in folders or not (folders[folder.name] / WEIGHTS_FILE).is_file():
                folders[folder.name] = folder
    return folders


def shipped_folder(name: str) -> Path:
    """Return the folder of a pretrained predictor or bundled model, which may lack its weights.

    Raises:
        UserError: There is no such predictor or model.
    """
    folders = shipped_folders()
    if name not in folders:
        raise unknown("pretrained predictor or bundled model", name, folders)
    return folders[name]


def pretrained_folder(name: str) -> Path:
    """Return the folder of a pretrained predictor.

    Raises:
        NotInstalledError: Its weights are not on this machine.
        UserError: There is no such predictor.
    """
    folder = shipped_folder(name)
    if not (folder / WEIGHTS_FILE).is_file():
        size = f" ({LARGE[name] / 1e6:.0f} MB)" if name in LARGE else ""
        raise NotInstalledError(
            f"{name}: its weights{size} are only in the project's repository; "
            f"set {CHECKPOINTS_VARIABLE} to checkpoints/ of a clone"
        )
    return folder


def list_pretrained() -> list[str]:
    """Return the names of the pretrained predictors: ``architecture.model-data[-size]``."""
    return sorted(name for name in shipped_folders() if "." in name)


def pretrained_figures() -> list[dict[str, Any]]:
    """Describe the pretrained predictors.

    Returns:
        One dictionary per predictor, as of `folder_figures`.

    Raises:
        UserError: The configuration of a predictor is damaged.
    """
    return [folder_figures(shipped_folder(name)) for name in list_pretrained()]


def folder_figures(folder: Path) -> dict[str, Any]:
    """Describe a predictor folder, which may lack its weights.

    Args:
        folder: Path of the predictor folder.

    Returns:
        Name of the folder, architecture, model, version of this package and hash of the weights, number of
        parameters, size in bytes, whether its weights are installed, lookaheads, training data, and the figures that
        `moe-beyond evaluate --record` stored.

    Raises:
        UserError: The configuration is damaged.
    """
    path, training = folder / CONFIG_FILE, ("source", "fingerprint", "split")
    config = check_config(read_json(path), str(path))
    installed = (folder / WEIGHTS_FILE).is_file()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "name": folder.name,
        "architecture": config["architecture"],
        "model": config["geometry"]["model"],
        "version": config["tool_version"],
        "sha256": config["sha256"],
        "parameters": config["parameters"],
        "bytes": size if installed else size + LARGE.get(folder.name, 0),
        "installed": installed,
        "lookaheads": config["lookaheads"],
        "training": {field: config["training"].get(field) for field in training},
        "figures": config.get("figures", []),
    }


def find_predictor(name: str) -> Path:
    """Find a predictor folder; one on the Hub is downloaded.

    Args:
        name: Folder, name of a pretrained predictor, or ``hf:ORG/REPO@REVISION``.

    Raises:
        UserError: The name matches nothing, or both a folder and a pretrained predictor; the weights are not
            installed, or the download fails.
    """
    if is_hub_name(name):
        return _downloaded(parse_hub_name(name))
    folder, names = Path(name), list_pretrained()
    if name not in names:
        if os.path.isdir(name):  # false for a name that is too long; Path.is_dir raises an exception
            return folder
        if os.path.exists(name):
            raise UserError(f"{name}: is a file, not a predictor folder; convert a checkpoint with moe-beyond package")
        if REPOSITORY.fullmatch(name) and near_path(name) is None:
            raise UserError(f"{name}: folder not found; if it is on the Hub, write {PREFIX}{name}")
        if "/" in name:
            raise no_such_file(name, "folder")
        raise unknown("predictor (neither a folder nor a pretrained one)", name, names)
    shipped = shipped_folder(name)
    if folder.exists() and folder.resolve() != shipped:
        raise UserError(f"{name!r} is both a folder here and a pretrained predictor; write ./{name} or {shipped}")
    return pretrained_folder(name)


def find_pretrained(name: str | Path, revision: str | None = None) -> Path:
    """Find a predictor folder as `find_predictor` does; ``ORG/REPO`` is a repository of the Hub.

    Args:
        name: Folder, name of a pretrained predictor, or ``ORG/REPO`` with or without ``hf:``; a `Path` is a folder.
        revision: Branch, tag or commit of a repository of the Hub (default: ``main``).

    Raises:
        UserError: As for `find_predictor`; or ``revision`` is given for a folder, or given twice.
    """
    if isinstance(name, Path):
        name = str(name.absolute())
    if is_hub_name(name):
        if revision is not None and "@" in name:
            raise UserError(f"{name}: has a revision, and so has revision={revision!r}; give one")
        return find_predictor(name if revision is None else f"{name}@{revision}")
    if REPOSITORY.fullmatch(name):
        if revision is None and Path(name).exists():
            raise UserError(f"{name!r} is a folder here, and may be on the Hub; write ./{name} or {PREFIX}{name}")
        return _downloaded(HubName(name, revision or "main"))
    if revision is not None:
        raise UserError(f"{name}: has no revisions (got revision={revision!r}); only a repository of the Hub has them")
    return find_predictor(name)


def _downloaded(name: HubName) -> Path:
    """Download a predictor; print its commit and the hash of its weights on standard error."""
    folder = download(name, "model", (CONFIG_FILE, WEIGHTS_FILE), (CARD_FILE,))
    sha256 = file_sha256(folder / WEIGHTS_FILE)
    notify(f"{name} is {folder.name}, {WEIGHTS_FILE} has sha256 {sha256}")
    return folder
