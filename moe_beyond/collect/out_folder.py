"""The folder in which a trace set is to be made, and the folder of its parts until then."""

import os
from pathlib import Path

from moe_beyond.errors import UserError
from moe_beyond.files import check_is_elsewhere, check_is_free


def pieces_folder(out: Path) -> Path:
    """Return the folder of the parts of a trace set that are collected so far; it is next to the set."""
    return out.parent / f".{out.name}.collecting"


def check_out(out: Path) -> None:
    """Refuse a folder that a trace set cannot be made at; one that was collected in part is fine.

    Raises:
        UserError: There is something already, or this process works inside it, or its parent cannot be written to.
    """
    check_is_elsewhere(out)
    if not pieces_folder(out).is_dir():
        check_is_free(out)
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{out}: cannot be made, choose another folder; {above}: Not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, since {above} cannot be written to; choose another folder")
