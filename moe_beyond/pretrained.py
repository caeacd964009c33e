"""Where fitted predictors lie: those that ship with this package, the user's own, and those on the Hugging Face Hub."""

import sys
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

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
"""What a predictor folder holds."""


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
                "training": {name: config.get("training", {}).get(name) for name in ("source", "fingerprint", "split")},
                "figures": config.get("figures", []),
            }
        )
    return found


def find_predictor(name: str) -> Path:
    """Find a predictor folder; one on the Hub is downloaded.

    Args:
        name: A folder, a published name, or ``hf:ORG/REPO@REVISION``.

    Raises:
        UserError: It is none of them, or two; or it cannot be downloaded.
    """
    if is_hub_name(name):
        return _downloaded(parse_hub_name(name))
    folder, names = Path(name), published_predictors()
    if name not in names:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{name}: is a file, not a predictor folder; make one of a checkpoint: moe-beyond package")
        if REPOSITORY.fullmatch(name) and near_path(name) is None:
            raise UserError(f"{name}: there is no such folder; if it is on the Hub, write {PREFIX}{name}")
        if "/" in name:
            raise no_such_file(name, "folder")
        raise unknown("predictor (neither a folder nor a published name)", name, names)
    published = checkpoints_folder() / name
    if folder.exists() and folder.resolve() != published.resolve():
        raise UserError(f"{name!r} is both a folder here and a published name; write ./{name} or {published}")
    return published


def find_pretrained(name: str | Path, revision: str | None = None) -> Path:
    """Find a predictor folder as `find_predictor` does, where ``ORG/REPO`` means the Hub too.

    Args:
        name: A folder, a published name, or ``ORG/REPO``, with ``hf:`` before it or not; a `Path` is a folder.
        revision: Branch, tag or commit of the repository; only the Hub has any.

    Raises:
        UserError: It is none of them, or two; or it cannot be downloaded.
    """
    if isinstance(name, Path):
        name = str(name.absolute())
    if is_hub_name(name):
        if revision is not None and "@" in name:
            raise UserError(f"{name}: names a revision, and so does revision={revision!r}; give one")
        return find_predictor(name if revision is None else f"{name}@{revision}")
    if REPOSITORY.fullmatch(name):
        if revision is None and Path(name).exists():
            raise UserError(f"{name!r} is a folder here, and may be on the Hub; write ./{name} or {PREFIX}{name}")
        return _downloaded(HubName(name, revision or "main"))
    if revision is not None:
        raise UserError(f"{name}: has no revisions (revision={revision!r}); only a repository of the Hub does")
    return find_predictor(name)


def _downloaded(name: HubName) -> Path:
    """Download a predictor and say which one it is."""
    folder = download(name, "model", (CONFIG_FILE, WEIGHTS_FILE), (CARD_FILE,))
    sha256 = file_sha256(folder / WEIGHTS_FILE)
    print(f"{name} is {folder.name}, {WEIGHTS_FILE} has sha256 {sha256}", file=sys.stderr)
    return folder
