"""Arrays of whole numbers in NumPy's files: a ``.npy``, a folder of them, or an ``.npz``.

They are read with the functions for NumPy's format, never with `numpy.load`, so no content is loaded as a pickle.
"""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief, shown
from moe_beyond.traces.formats._files import source_files

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Version of a file -> reader of its header; later versions are only for named fields."""


LARGE, MOST_COMPRESSED = 2**26, 100
"""An ``.npz`` member of more bytes than the first, compressed by more than the second, is refused: no recording is."""


@dataclass(frozen=True)
class StoredArray:
    """An array whose header was read, but not its content.

    Attributes:
        location: Path of the file, and the name in an ``.npz``, for error messages.
        shape: Shape of the array.
        open: Function that opens the bytes of the ``.npy``.
    """

    location: str
    shape: tuple[int, ...]
    open: Callable[[], AbstractContextManager[IO[bytes]]]

    def read(self) -> npt.NDArray[Any]:
        """Read the array.

        Raises:
            UserError: The file is damaged or truncated.
        """
        with _naming(self.location), self.open() as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return array


def find_arrays(source: Path) -> dict[str, StoredArray]:
    """Return name -> array of a recording; the files of a folder are in natural order.

    Args:
        source: Path of a ``.npy``, of a folder of them, or of an ``.npz``.

    Raises:
        UserError: The path is none of these, or an array cannot be read or does not hold whole numbers.
    """
    if source.suffix == ".npz" and source.is_file():
        return _archived(source)
    return {path.stem: stored_array(path) for path in source_files(source, ".npy")}


def stored_array(path: Path) -> StoredArray:
    """Read the header of a ``.npy`` file.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file cannot be read, or does not hold whole numbers.
    """
    with _naming(str(path)):
        size = path.stat().st_size
    return _read_header(str(path), lambda: path.open("rb"), size)


def _archived(source: Path) -> dict[str, StoredArray]:
    with _naming(str(source)):
        archive = zipfile.ZipFile(source)
        members = archive.infolist()
    arrays: dict[str, StoredArray] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise UserError(f"{source}: all members must be .npy files (got {name!r})")
        if name in arrays:
            raise UserError(f"{source}: has two members {name!r}; rename one")
        location = f"{source}: {name}" if name.isprintable() else f"{source}: {name!r}"
        if member.file_size > max(LARGE, MOST_COMPRESSED * member.compress_size):
            raise UserError(
                f"{location}: unpacks {member.compress_size:,} bytes to {member.file_size:,}, unlike any recording; "
                "if it is one, save it without compression"
            )
        arrays[name] = _read_header(location, partial(archive.open, member), member.file_size)
    if not arrays:
        raise UserError(f"{source}: has no array; save at least one")
    return arrays


def _read_header(location: str, opened: Callable[[], AbstractContextManager[IO[bytes]]], size: int) -> StoredArray:
    """Read the header of an array, and compare it with the ``size`` of its ``.npy`` in bytes."""
    with _naming(location), opened() as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"format version {version}")
        shape, _, dtype = HEADERS[version](file)
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"shape {shape}")
        needed, available = math.prod(shape) * dtype.itemsize, size - file.tell()
        if not dtype.hasobject and needed != available:
            raise ValueError(
                f"its header gives {dtype} {shape}, which is {shown(needed)} bytes, but {available:,} follow"
            )
    if dtype.hasobject:
        raise UserError(f"{location}: holds pickled objects, which are never loaded; save an array of whole numbers")
    if dtype.kind not in "iu" and needed:  # an empty list is saved as an empty array of floats
        raise UserError(f"{location}: must hold whole numbers (got {str(dtype)[:60]})")
    return StoredArray(location, shape, opened)


@contextmanager
def _naming(location: str) -> Iterator[None]:
    """Turn errors of numpy and zipfile into a `UserError` with the place of the array."""
    try:
        yield
    except Exception as error:  # numpy evaluates headers as Python, and documents no exceptions
        if isinstance(error, UserError):
            raise
        raise UserError(f"{location}: cannot be read as a NumPy array ({brief(error)})") from error
