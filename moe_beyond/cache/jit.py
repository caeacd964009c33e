"""numba's compiler, typed, with a cache on disk that functions passed as arguments do not defeat."""

import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """Compile a module-level function without Python objects, and keep the result for later processes.

    numba finds a stored result by the types of the arguments. For an argument that is itself compiled, that type is an
    identity drawn at random in each process, so nothing would ever be found; here it is derived from the function's
    name and its file's content. A stored result is dropped when the function's own file changes, not when another's
    does: so a compiled function may call those of its own file, and gets all others as arguments.
    """
    dispatcher = numba.njit(function, cache=True, nogil=True)
    name = f"{function.__module__}.{function.__qualname__} {_source(function.__code__.co_filename)}"
    dispatcher._set_uuid(str(uuid.uuid5(uuid.NAMESPACE_OID, name)))  # noqa: SLF001
    return cast(Function, dispatcher)


@lru_cache
def _source(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")
