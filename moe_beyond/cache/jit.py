"""numba's compiler, typed, with a cache on disk that holds across files and for functions passed as arguments."""

import hashlib
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar, cast

import numba

from moe_beyond.compiling import kept

ANNOUNCEMENT = "compiling the cache simulator once: this takes about half a minute"

Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """Compile a module-level function without Python objects or allocation, and keep the result for later processes.

    Wherever another compiled one calls it, it is written out in place: the state that it is passed is many words long,
    and to hand those over costs more than most of these functions do.
    """
    return _compile(function, inline=True)


def jit_apart(function: Function) -> Function:
    """Compile likewise, but leave calls as calls.

    For loops over many numbers: by itself the compiler makes them look at several at once, written out in place not.
    """
    return _compile(function, inline=False)


def _compile(function: Function, *, inline: bool) -> Function:
    """Settle two things that numba leaves to chance.

    It finds a stored result by the types of the arguments, and the type of an argument that is itself compiled is an
    identity drawn at random in each process; here it is derived from the function's name and source. And it drops a
    stored result when the function's own file changes, but not when the file of one that it calls does; here it is
    dropped when any file of this package's folder does.
    """
    # Without the runtime for allocation: its counting of references costs more than all that these functions do.
    dispatcher = numba.njit(function, nogil=True, forceinline=inline, _nrt=False)  # type: ignore[call-overload]
    kept(dispatcher, function, ANNOUNCEMENT)
    stamp = _stamp(function.__code__.co_filename)
    name = f"{function.__module__}.{function.__qualname__} {stamp}"
    dispatcher._set_uuid(str(uuid.uuid5(uuid.NAMESPACE_OID, name)))  # noqa: SLF001
    if (file := getattr(dispatcher._cache, "_cache_file", None)) is not None:  # noqa: SLF001
        file._source_stamp = stamp  # noqa: SLF001
    return cast(Function, dispatcher)


@lru_cache
def _stamp(path: str) -> str:
    """Hash a file together with all that it may call."""
    return hashlib.sha256(_folder_stamp().encode() + Path(path).read_bytes()).hexdigest()


@lru_cache
def _folder_stamp() -> str:
    folder = Path(__file__).parent
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return content.hexdigest()
