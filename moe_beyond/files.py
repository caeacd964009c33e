"""Writing files and folders so that nobody ever finds a half-written one."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file has no room: a full disk, a quota, a limit of file sizes."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries that are written in Rust tell it, such as safetensors."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, delete it on any error.

    The file is flushed to the disk before it is renamed, and its folder after: even a power cut leaves the earlier file
    or the later one.

    Raises:
        UserError: There is no room for it.
    """
    path = Path(path)
    with _naming_what_has_no_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def creating(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path as `replacing` does, for a file that must not be there yet.

    Raises:
        UserError: ``path`` exists.
    """
    if Path(path).exists():
        raise UserError(f"{path} already exists; choose another name or remove it")
    with replacing(path) as temporary:
        yield temporary


@contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; rename it to ``path`` on success, delete it on any error.

    Args:
        path: The folder to make.
        overwrite: Replace a folder that is already there, instead of refusing.

    Raises:
        UserError: ``path`` exists, is not an empty folder, and ``overwrite`` is off; this process works inside it;
            or there is no room.
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another folder or remove it")
    check_is_elsewhere(path)
    with _naming_what_has_no_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):  # libraries write some files for their owner alone
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            if path.is_dir() and overwrite:
                aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.replace(aside)
                temporary.replace(path)
                shutil.rmtree(aside)
            else:
                if path.is_dir():
                    path.rmdir()  # empty, or somebody filled it meanwhile, and it stays
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_is_elsewhere(path: Path) -> None:
    """Refuse to make a folder that this process works inside.

    Raises:
        UserError: It does.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: the folder to make cannot be the present one or one above it; choose another")


def is_earlier_result(folder: str | Path, marker: str, *names: str) -> bool:
    """Tell whether a folder is one that this package made before, with nothing of the user's in it.

    Args:
        folder: The folder; it need not exist.
        marker: The file by which such a folder is known.
        *names: Patterns of whatever else may lie there.
    """
    found = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    return marker in found and all(any(fnmatchcase(name, known) for known in (marker, *names)) for name in found)


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON with a final newline, atomically; the same content gives the same bytes."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets without end
        raise UserError(f"{path}: is not JSON ({error})") from error


@contextmanager
def _naming_what_has_no_room(path: Path) -> Iterator[None]:
    """Turn what the system says of a full disk, naming no file, into a line that does."""
    try:
        yield
    except Exception as error:
        found = OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in FULL or isinstance(error, UserError):
            raise
        told = os.strerror(number)
        raise UserError(f"{path}: cannot be written ({told}); make room, then run the same command again") from error


def _flush(path: Path) -> None:
    """Let the disk take a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
