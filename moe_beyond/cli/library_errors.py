"""Errors that a library raises about an option, as one line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moe_beyond.cli.parser import causes_of
from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief

PACKAGE = Path(__file__).parents[1]
MAX_LENGTH = 400
"""Characters of a library's message that are shown."""
PROGRAMMING_ERRORS = (AssertionError, AttributeError, LookupError, NameError)
"""Errors that mean a wrong call of a library, in contrast to a wrong value."""


@contextmanager
def as_user_error(location: str = "", *, constructing: bool = False) -> Iterator[None]:
    """Turn an error of a library about an option into one line; a fault of this package keeps its traceback.

    An error is about an option in three cases. No code of this package, other than the command line, leads to the code
    that raised it. A callback of a library raised it. A class of torch refuses a constructor argument. While classes
    are constructed, there is a fourth case: a library rejects a value that a class of this package passes on.

    Args:
        location: Place of the error in the message (default: the class that raised it).
        constructing: Whether the block constructs the classes that the configuration names (default: False).

    Raises:
        UserError: An option is at fault.
    """
    try:
        yield
    except Exception as error:
        causes = list(causes_of(error))
        if user_error := next((cause for cause in causes if isinstance(cause, UserError)), None):
            text = str(user_error).strip().splitlines()[-1]  # torch puts the traceback of a worker process before it
            raise UserError(text.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
        cause = next(cause for cause in causes if cause.__cause__ is None or not _raised_in(cause, "jsonargparse"))
        if isinstance(error, OSError) or not _is_about_an_option(cause, constructing):
            raise
        location = location or _class_in_configuration(cause)
        raise UserError(f"{location + ': ' if location else ''}{brief(cause, MAX_LENGTH).rstrip('.')}") from error


def _is_about_an_option(error: BaseException, constructing: bool) -> bool:
    files = [_file(frame) for frame in _frames(error)]
    if _is_of_a_callback(error) or _is_of_a_constructor(error):
        return True
    module = type(error).__module__
    if "DataLoader worker process" in str(error) or any("autograd" in file.parts for file in files):
        return False
    if module.startswith("wandb"):
        return False  # `finishing_wandb` reports it
    if not any(PACKAGE in file.parents and file.parent != PACKAGE / "cli" for file in files):
        return constructing or not isinstance(error, PROGRAMMING_ERRORS)
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("moe_beyond")
    of_a_library = module.startswith(("lightning", "torch.", "torch._dynamo", "torch._inductor"))
    of_a_library |= isinstance(error, (ValueError, ArithmeticError)) and _raised_in(error, "lightning")
    rejects = constructing and PACKAGE not in files[-1].parents and isinstance(error, (ValueError, RuntimeError))
    return of_a_library or rejects or isinstance(error, MemoryError)


def _is_of_a_callback(error: BaseException) -> bool:
    """Return whether a callback, logger or profiler of a library raised an error without code of this package."""
    from lightning import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler

    frames = _frames(error)
    of_a_library = [
        position
        for position, frame in enumerate(frames)
        if isinstance(frame.f_locals.get("self"), (Callback, Logger, Profiler)) and PACKAGE not in _file(frame).parents
    ]
    return bool(of_a_library) and not any(PACKAGE in _file(frame).parents for frame in frames[of_a_library[-1] :])


def _is_of_a_constructor(error: BaseException) -> bool:
    """Return whether a class of torch, such as a loader or an optimizer, refuses a constructor argument."""
    last = _frames(error)[-1]
    return isinstance(error, ValueError) and last.f_code.co_name == "__init__" and "torch" in _file(last).parts


def _class_in_configuration(error: BaseException) -> str:
    """Return the class that raised an error, among those that a configuration can name; otherwise ``""``."""
    import lightning as L
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    named = (L.Trainer, L.Callback, L.LightningModule, L.LightningDataModule, Logger, Profiler, Strategy)
    # A frame of __getattr__ belongs to a module that lacks an attribute, not to its reader.
    frames = [frame for frame in _frames(error) if frame.f_code.co_name != "__getattr__"]
    objects = [frame.f_locals.get("self") for frame in reversed(frames)]
    return next((type(instance).__name__ for instance in objects if isinstance(instance, named)), "")


def _frames(error: BaseException) -> list[FrameType]:
    """Return the frames of an error's traceback, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _raised_in(error: BaseException, package: str) -> bool:
    frames = _frames(error)
    return bool(frames) and package in _file(frames[-1]).parts
