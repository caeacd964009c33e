"""Disk cache of code that numba compiles: one compilation per machine, one log line, recovery from damage."""

import getpass
import hashlib
import io
import logging
import os
import pickle
import stat
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    NullCache,
    UserProvidedCacheLocator,
)

from moe_beyond.unfinished import lasting_temporary_folder

Function = TypeVar("Function", bound=Callable[..., object])

SEAL_BYTES = 32
"""Length of the hash at the start of each stored file."""

log = logging.getLogger("moe_beyond")


class _PrivateFolder(UserProvidedCacheLocator):
    """Stores compiled code in a private folder under TMPDIR if neither the package nor the home folder is writable."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno
        subfolder = self.get_suitable_cache_subpath(file)  # type: ignore[no-untyped-call]
        self._cache_path = str(private_folder() / subfolder)

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        """Return a locator whose folder is writable, or None."""
        if not Path(file).is_file():  # a prompt or a string: its code has no stamp
            return None
        try:
            locator = cls(function, file)
            locator.ensure_cache_path()  # type: ignore[no-untyped-call]
        except OSError:
            return None
        return locator


def private_folder() -> Path:
    """Create the user's private folder for compiled code under TMPDIR and return it.

    Raises:
        OSError: The folder cannot be created, or another user owns it or can write to it, whose code must not run.
    """
    folder = lasting_temporary_folder() / f"moe-beyond-{_user()}"
    try:
        folder.mkdir(mode=0o700)
        _note_once(f"compiled code is stored in {folder}: neither the package nor the home folder is writable")
    except FileExistsError:  # an earlier process created and logged it
        pass
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by other users")
    return folder


def _user() -> str:
    if hasattr(os, "getuid"):
        return str(os.getuid())
    return hashlib.sha256(getpass.getuser().encode()).hexdigest()[:8]


class _CacheFiles(CompileResultCacheImpl):
    _locator_classes = [*CompileResultCacheImpl._locator_classes, _PrivateFolder]  # noqa: SLF001, RUF012


def _not_imported(*_: object) -> None:
    """Stand-in for a class or function of a module that is not imported."""


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index without importing modules of other packages, which may be slow or no longer installed.

    This process never looks up a signature of such a module.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of an imported module, of this package or of numba; otherwise a stand-in."""
        if module not in sys.modules and module.partition(".")[0] not in ("moe_beyond", "numba"):
            return _not_imported
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):  # a file or a name that was removed
            return _not_imported


class _SealedFiles(IndexDataCacheFile):
    """Index of stored code by signature, and the files of the code; policies of several packages share an index.

    Each file begins with a hash of its content, of numba's version and of the source's stamp. A file that is truncated,
    damaged or left by another version is a miss: its content is never unpickled, and its machine code never run.
    """

    def _load_index(self) -> dict[Any, Any]:
        """Return the data files by signature, or nothing if the index is missing, damaged or outdated."""
        try:
            content = self._unsealed(self._index_path)
        except OSError:
            return {}
        return dict(_IndexUnpickler(io.BytesIO(content)).load())

    def _save_index(self, overloads: dict[Any, Any]) -> None:
        self._write(self._index_path, self._dump(overloads))  # type: ignore[no-untyped-call]

    def _load_data(self, name: str) -> Any:
        """Return stored code; an error of the system is a miss for numba."""
        content = self._unsealed(self._data_path(name))  # type: ignore[no-untyped-call]
        return pickle.loads(content)  # nosec B301 # sealed, in this user's own folder

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), self._dump(data))  # type: ignore[no-untyped-call]

    def _write(self, path: str, content: bytes) -> None:
        with self._open_for_write(path) as file:
            file.write(self._seal(content) + content)

    def _unsealed(self, path: str) -> bytes:
        """Return the content of a stored file.

        Raises:
            OSError: The file is missing, damaged, or of other code.
        """
        stored = Path(path).read_bytes()
        content = stored[SEAL_BYTES:]
        if stored[:SEAL_BYTES] != self._seal(content):
            raise OSError(f"{path} is damaged or outdated")
        return content

    def _seal(self, content: bytes) -> bytes:
        return hashlib.sha256(repr((self._version, self._source_stamp)).encode() + content).digest()


class _Cache(FunctionCache):
    """Disk cache that treats unreadable and unwritable files as missing."""

    _impl_class = _CacheFiles
    announcement = ""

    def __init__(self, function: Any) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        file = self._cache_file
        self._cache_file = _SealedFiles(self._cache_path, self._impl.filename_base, file._source_stamp)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the stored code, or None if there is none."""
        overload = super().load_overload(signature, target)  # type: ignore[no-untyped-call]
        if overload is None and self.announcement:
            _note_once(self.announcement)
        return overload

    def save_overload(self, signature: Any, data: Any) -> None:
        """Store compiled code if the disk has space."""
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            _note_once(f"compiled code is not stored ({error}): it is compiled again next time")


@lru_cache
def _note_once(line: str) -> None:
    """Log a warning once per process; without a logging configuration it is printed on standard error."""
    log.warning("moe-beyond: %s", line)


def keep_compiled(dispatcher: Any, function: Function, announcement: str = "") -> Function:
    """Store the code that numba compiles for a function, for later processes.

    Args:
        dispatcher: Result of `numba.njit` without ``cache=True``.
        function: Python function that was compiled.
        announcement: Line to log when the function is compiled, once per process (default: none).
    """
    try:
        dispatcher._cache = _Cache(function)  # noqa: SLF001
        dispatcher._cache.announcement = announcement  # noqa: SLF001
    except RuntimeError:  # no folder is writable, or the function has no file
        dispatcher._cache = NullCache()  # noqa: SLF001
        _note_once("no folder is writable for compiled code (set NUMBA_CACHE_DIR): it is compiled each time")
    return cast(Function, dispatcher)


def compiled(function: Function) -> Function:
    """Compile a module-level function and store the result for later processes."""
    return keep_compiled(numba.njit(function), function)
