"""Configuration files that ship with this package, by names such as ``trainer/default``."""

from pathlib import Path

from moe_beyond.download import near_path
from moe_beyond.errors import UserError, nearest

SUFFIX = ".yaml"
SWEEPS = "sweeps"
"""Folder of configurations that `wandb sweep` reads; ``-c`` does not."""


def configs_folder() -> Path:
    """Return the folder ``configs/``: inside an installed package, next to the package in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return (installed if installed.is_dir() else package.parent / "configs").resolve()


def list_configs() -> list[str]:
    """Return the names of the built-in configurations: ``folder/name``, without the suffix."""
    folder = configs_folder()
    names = [str(path.relative_to(folder).with_suffix("")) for path in folder.glob(f"*/*{SUFFIX}")]
    return sorted(name for name in names if not name.startswith(f"{SWEEPS}/"))


def find_config(name: str) -> Path:
    """Find a configuration file.

    Args:
        name: File, or name of a built-in configuration.

    Raises:
        UserError: The name matches nothing, a folder, or both a file here and a built-in configuration.
    """
    path, names = Path(name), list_configs()
    if name in names:
        builtin = configs_folder() / f"{name}{SUFFIX}"
        if path.exists() and path.resolve() != builtin:
            raise UserError(f"is both a file here and a built-in configuration; write ./{name} or {builtin}")
        return builtin
    if path.is_dir():
        raise UserError("is a folder; name a file")
    if not path.exists():
        near = near_path(name) or nearest(name.removesuffix(SUFFIX).removeprefix(f"{configs_folder().name}/"), names)
        hint = f"did you mean {near}?" if near else "name a file or a built-in configuration (see fit --help)"
        raise UserError(f"not found; {hint}")
    return path
