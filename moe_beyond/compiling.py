"""Disk cache of code that numba compiles: one compilation per machine, one log line, recovery from damage."""

import getpass
import hashlib
import logging
import os
import pickle
import sys
import tempfile
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

Function = TypeVar("Function", bound=Callable[..., object])

DAMAGE = (
    *(OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(ImportError, RuntimeError, UnicodeDecodeError),
)
"""Errors of pickle and LLVM for a truncated or unreadable file."""

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
        OSError: The folder cannot be created, or belongs to another user, whose code must not run.
    """
    folder = Path(tempfile.gettempdir()) / f"moe-beyond-{_user()}"
    try:
        folder.mkdir(mode=0o700)
        _note_once(f"compiled code is stored in {folder}: neither the package nor the home folder is writable")
    except FileExistsError:  # an earlier process created and logged it
        pass
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user")
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


class _IndexFile(IndexDataCacheFile):
    """Index of stored code by signature; policies of several packages share it."""

    def _load_index(self) -> dict[Any, Any]:
        """Return the data files by signature, or nothing if the index is missing or outdated."""
        try:
            with open(self._index_path, "rb") as file:
                if pickle.load(file) != self._version:  # nosec B301 # written by this user's numba
                    return {}
                stamp, overloads = _IndexUnpickler(file).load()
        except FileNotFoundError:
            return {}
        return dict(overloads) if stamp == self._source_stamp else {}


class _Cache(FunctionCache):
    """Disk cache that treats unreadable and unwritable files as missing."""

    _impl_class = _CacheFiles
    announcement = ""

    def __init__(self, function: Any) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        file = self._cache_file
        self._cache_file = _IndexFile(self._cache_path, self._impl.filename_base, file._source_stamp)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the stored code, or None if there is none or its file is damaged."""
        try:
            overload = super().load_overload(signature, target)  # type: ignore[no-untyped-call]
        except DAMAGE:
            self._drop()
            overload = None
        if overload is None and self.announcement:
            _note_once(self.announcement)
        return overload

    def save_overload(self, signature: Any, data: Any) -> None:
        """Store compiled code if the disk has space."""
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
            _note_once(f"compiled code is not stored ({error}): it is compiled again next time")

    def _drop(self) -> None:
        """Remove a damaged index, so that all code is compiled again."""
        try:
            Path(self._cache_file._index_path).unlink(missing_ok=True)  # noqa: SLF001
        except OSError as error:
            _note_once(f"compiled code is damaged and cannot be removed ({error}): it is compiled each time")


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
