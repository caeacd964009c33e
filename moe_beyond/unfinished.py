"""Hidden folders for content that is being written, next to its target, and their removal after a kill.

The process that writes holds a lock on its folder. The system releases the lock when the process ends, however it ends,
so a folder without a lock is a leftover. File systems without locks keep their leftovers.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from moe_beyond.errors import UserError

Result = TypeVar("Result")

UNFINISHED = re.compile(r"\.(?P<target>.+)\.unfinished-[a-z0-9_]{8}", re.DOTALL)
"""Name of a hidden folder: the name of its target, and random characters of `tempfile`."""
EXCHANGE = 2
"""``RENAME_EXCHANGE`` of Linux."""
AT_FDCWD = -100
LONGEST_PARENT = 50
"""Length of the path of a folder in which sockets of `multiprocessing` still have room; Linux allows 107 characters."""
CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""Error numbers of a file system or a system that cannot exchange two names."""


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder next to a target, and remove it at the end with its content.

    The first call of a process for a parent folder removes the leftovers there of processes that were killed.

    Args:
        target: File or folder to write, whose parent exists.
    """
    _remove_leftovers_once(os.path.abspath(target.parent), os.getpid())
    folder, handle = _make_locked(target)
    try:
        yield folder
    finally:
        _discard(folder, target)
        os.close(handle)


@contextmanager
def temporary_files() -> Iterator[None]:
    """Keep the temporary files of this process and of its children in a folder that is removed at the end.

    Libraries leave temporary files when a process is killed. The next process removes its folder with all of them.
    """
    try:
        before, parent = tempfile.tempdir, Path(tempfile.gettempdir())
    except OSError:  # no folder for temporary files can be written
        yield
        return
    if len(str(parent)) > LONGEST_PARENT:
        yield
        return
    variable = os.environ.get("TMPDIR")
    with unfinished_folder(parent / "mb") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before
            if variable is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = variable


def lasting_temporary_folder() -> Path:
    """Return the folder for temporary files that outlive this process, outside of that of `temporary_files`.

    Raises:
        OSError: There is none that can be written.
    """
    parts = Path(tempfile.gettempdir()).parts
    return Path(*takewhile(lambda part: not UNFINISHED.fullmatch(part), parts))


def _make_locked(target: Path) -> tuple[Path, int]:
    """Make a hidden folder and lock it; return its path and the descriptor that holds the lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # a file system without locks: nobody removes the folder
                return folder, handle
        else:
            if folder.exists():
                return folder, handle
        os.close(handle)


def remove_leftovers(parent: str | Path) -> None:
    """Remove the hidden folders in a folder whose processes were killed.

    A folder that a killed process was about to replace, and that is missing, is moved back.

    Args:
        parent: Folder of the targets; a missing one has no leftovers.
    """
    try:
        names = os.listdir(parent)
    except OSError:
        return
    for name in names:
        if match := UNFINISHED.fullmatch(name):
            _remove_leftover(Path(parent) / name, Path(parent) / match["target"])


@lru_cache(maxsize=1024)
def _remove_leftovers_once(parent: str, process: int) -> None:
    remove_leftovers(parent)


def _remove_leftover(folder: Path, target: Path) -> None:
    """Remove a hidden folder unless its process runs, or another user owns it."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no folder, or removed meanwhile
        return
    try:
        if os.fstat(handle).st_uid == os.getuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _discard(folder, target)
    except OSError:  # its process runs, or the file system has no locks
        pass
    finally:
        os.close(handle)


def _discard(folder: Path, target: Path) -> None:
    """Remove a hidden folder; if it holds the only copy of its target, move that back first."""
    replaced = folder / _replaced_name(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    shutil.rmtree(folder, ignore_errors=True)


def exchange(new: Path, target: Path) -> None:
    """Put a new folder in the place of an old one; the old one is then in the hidden folder.

    This is one step where the file system can exchange two names. Elsewhere it is two: a kill in between leaves no
    target until `remove_leftovers` moves the old one back.

    Args:
        new: Folder in a hidden folder of `unfinished_folder`.
        target: Folder to replace.

    Raises:
        OSError: A folder cannot be renamed.
    """
    if not _exchange_names(new, target):
        target.rename(new.with_name(_replaced_name(target)))
        new.rename(target)


def _replaced_name(target: Path) -> str:
    return f"{target.name}.replaced"


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return whether the system and the file system can.

    Raises:
        OSError: A name cannot be changed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def read_whole(folder: Path, read: Callable[[], Result]) -> Result:
    """Read several files of a folder that another process may replace meanwhile; then they are read again.

    Args:
        folder: Folder of the files.
        read: Function that reads them, and raises an error if they do not fit each other.

    Raises:
        UserError: The folder has not changed, and cannot be read.
    """
    while True:
        before = _identity(folder)
        try:
            return read()
        except (UserError, OSError):
            if _identity(folder) == before:
                raise


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Return values that differ after a folder was replaced; None if it is missing."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
