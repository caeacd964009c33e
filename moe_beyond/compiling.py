"""The store of code that numba compiles: it compiles once per machine, says so, and rebuilds a damaged store."""

import getpass
import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, UserProvidedCacheLocator

Function = TypeVar("Function", bound=Callable[..., object])

DAMAGE = (
    *(OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(ImportError, RuntimeError, UnicodeDecodeError),
)
"""Errors of pickle and LLVM for a file that is cut short or cannot be read."""

log = logging.getLogger("moe_beyond")


class _PrivateFolder(UserProvidedCacheLocator):
    """Keeps compiled code in the user's own folder under TMPDIR, where neither package nor home can be written."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno
        subfolder = self.get_suitable_cache_subpath(file)  # type: ignore[no-untyped-call]
        self._cache_path = str(private_folder() / subfolder)

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        """Return a place that can be written, or None."""
        try:
            locator = cls(function, file)
            locator.ensure_cache_path()  # type: ignore[no-untyped-call]
        except OSError:
            return None
        return locator


def private_folder() -> Path:
    """Return the user's own folder for compiled code under TMPDIR, made on the way.

    Raises:
        OSError: It cannot be made, or belongs to somebody else, whose code must not be run.
    """
    folder = Path(tempfile.gettempdir()) / f"moe-beyond-{_user()}"
    try:
        folder.mkdir(mode=0o700)
        _note_once(f"compiled code goes to {folder}: neither the package nor the home folder can be written")
    except FileExistsError:  # an earlier process made it, and said so
        pass
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _user() -> str:
    if hasattr(os, "getuid"):
        return str(os.getuid())
    return hashlib.sha256(getpass.getuser().encode()).hexdigest()[:8]


class _Place(CompileResultCacheImpl):
    _locator_classes = [*CompileResultCacheImpl._locator_classes, _PrivateFolder]  # noqa: SLF001, RUF012


class _Cache(FunctionCache):
    """A store that treats what cannot be read or written as not there."""

    _impl_class = _Place
    announcement = ""

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return what is stored; None where nothing is, or what is stored is damaged."""
        try:
            overload = super().load_overload(signature, target)  # type: ignore[no-untyped-call]
        except DAMAGE:
            self._drop()
            overload = None
        if overload is None and self.announcement:
            _note_once(self.announcement)
        return overload

    def save_overload(self, signature: Any, data: Any) -> None:
        """Store what was compiled, where there is room."""
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
            _note_once(f"compiled code is not kept ({error}): it is compiled again next time")

    def _drop(self) -> None:
        """Remove a damaged index, without which nothing stored is found."""
        try:
            Path(self._cache_file._index_path).unlink(missing_ok=True)  # noqa: SLF001
        except OSError as error:
            _note_once(f"compiled code is damaged and cannot be removed ({error}): it is compiled each time")


@lru_cache
def _note_once(line: str) -> None:
    """Print a line on standard error, by the way that `logging` has for programs that set nothing up."""
    log.warning("moe-beyond: %s", line)


def kept(dispatcher: Any, function: Function, announcement: str = "") -> Function:
    """Keep what numba compiles of a function for later processes.

    Args:
        dispatcher: Result of `numba.njit` without ``cache=True``.
        function: The function that was compiled.
        announcement: Line to print when it has to be compiled, once per process; default: nothing.
    """
    try:
        dispatcher._cache = _Cache(function)  # type: ignore[no-untyped-call]  # noqa: SLF001
        dispatcher._cache.announcement = announcement  # noqa: SLF001
    except RuntimeError:  # no place at all can be written
        dispatcher._cache = NullCache()  # noqa: SLF001
        _note_once("no folder can be written for compiled code (set NUMBA_CACHE_DIR): it is compiled each time")
    return cast(Function, dispatcher)


def compiled(function: Function) -> Function:
    """Compile a module-level function, and keep the result for later processes."""
    return kept(numba.njit(function), function)
