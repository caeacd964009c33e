"""numba's compiler with types, and with a disk cache that holds across files and for functions passed as arguments."""

import hashlib
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from moe_beyond.compiling import keep_compiled

ANNOUNCEMENT = "compiling the cache simulator once: this takes about half a minute"

Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """Compile a module-level function without Python objects or allocation, and store the result for later processes.

    Calls from other compiled functions are inlined: passing the many words of the cache's arrays costs more than most
    of these functions do.
    """
    return _compile(function, inline=True)


def jit_apart(function: Function) -> Function:
    """Compile a function like `jit`, but do not inline its calls.

    Use it for loops over many numbers: the compiler vectorises them in a function of their own, but not inlined.
    """
    return _compile(function, inline=False)


def jit_entry(function: Function) -> Function:
    """Compile a function like `jit` for short calls from Python, which keep the interpreter's lock.

    A call that released the lock would wait for another thread to give it back, for longer than the function takes.
    """
    return _compile(function, inline=False, nogil=False)


def bind(function: Callable[..., Any], *examples: object) -> Callable[..., Any]:
    """Return the machine code of a compiled function for arguments of one type each.

    Numba looks up the types of all arguments at every call, which takes 50 microseconds for the arrays and hooks of a
    cache. The returned function looks up none: other types, data types or layouts of arrays are read wrongly.

    Args:
        function: Result of `jit_entry`.
        examples: Arguments with the types of all later calls.
    """
    dispatcher = cast(Any, function)
    return cast(Callable[..., Any], dispatcher.compile(tuple(dispatcher.typeof_pyval(example) for example in examples)))


def _compile(function: Function, *, inline: bool, nogil: bool = True) -> Function:
    """Compile a function and make its stored result depend on all code that it may call.

    numba finds a stored result by the types of the arguments. The type of a compiled function is an identity that is
    random in each process, so here it is derived from the function's name and source. numba also drops a stored result
    only if the function's own file changes. Here it is dropped if any file of this package's folder changes, or any
    file next to the function's own file (a policy of another package).
    """
    # Without the allocation runtime: its reference counting costs more than these functions do.
    dispatcher = numba.njit(function, nogil=nogil, forceinline=inline, _nrt=False)  # type: ignore[call-overload]
    keep_compiled(dispatcher, function, ANNOUNCEMENT)
    stamp = _stamp(function.__code__.co_filename, repr(function.__code__.co_code))
    name = f"{function.__module__}.{function.__qualname__} {stamp}"
    dispatcher._set_uuid(str(uuid.uuid5(uuid.NAMESPACE_OID, name)))  # noqa: SLF001
    if (file := getattr(dispatcher._cache, "_cache_file", None)) is not None:  # noqa: SLF001
        file._source_stamp = stamp  # noqa: SLF001
    return cast(Function, dispatcher)


def _stamp(path: str, code: str) -> str:
    """Return a hash of the core and of the files next to a function's file; of its code if it has no file."""
    core, file = Path(__file__).parent, Path(path)
    if core in file.parents:
        return _hash(core)
    own = _hash(file.parent, "*.py") if file.is_file() else hashlib.sha256(code.encode()).hexdigest()
    return f"{_hash(core)} {own}"


@lru_cache
def _hash(folder: Path, pattern: str = "**/*.py") -> str:
    content = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        content.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return content.hexdigest()
