"""The folder of a new trace set, and the folder of its part files while a collection runs."""

import os
from pathlib import Path

from moe_beyond.errors import UserError
from moe_beyond.files import check_is_elsewhere, check_is_free
from moe_beyond.unfinished import unfinished_folder


def parts_folder(out: Path) -> Path:
    """Return the folder of the part files of an unfinished collection; it is next to the trace set.

    Args:
        out: Folder of the trace set.
    """
    return out.parent / f".{out.name}.collecting"


def check_out(out: Path) -> None:
    """Check that a trace set can be made at a folder; an unfinished collection there is fine.

    Args:
        out: Folder of the trace set.

    Raises:
        UserError: The folder exists, contains the working directory, or its parent is not writable.
    """
    check_is_elsewhere(out)
    if not parts_folder(out).is_dir():
        check_is_free(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{out}: cannot be made, choose another folder; {parent}: Not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, because {parent} is not writable; choose another folder")
    try:  # a file system such as /proc refuses new folders whatever its permissions say
        with unfinished_folder(parent / out.name):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot be made in {parent} ({error.strerror}); choose another folder") from error
