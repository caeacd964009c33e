"""Arrays of whole numbers as numpy stores them: in a ``.npy``, in a folder of those, or in an ``.npz``.

They are read by numpy's format alone, never by `numpy.load`: nothing of what a file holds is taken for a pickle.
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
from moe_beyond.fields import brief, shown
from moe_beyond.traces.formats._files import source_files

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""By a file's version; later ones differ in what only named fields need."""


LARGE, MOST_COMPRESSED = 2**26, 100
"""A member of an ``.npz`` beyond so many bytes that is compressed so many times is refused: expert ids never are."""


@dataclass(frozen=True)
class StoredArray:
    """An array that was looked at and not read.

    Attributes:
        where: Its file, or its name in an ``.npz``, for messages.
        shape: Its shape.
        open: Opens the bytes of its ``.npy``.
    """

    where: str
    shape: tuple[int, ...]
    open: Callable[[], AbstractContextManager[IO[bytes]]]

    def read(self) -> npt.NDArray[Any]:
        """Read it: whole numbers.

        Raises:
            UserError: It is damaged, or cut short.
        """
        with _naming(self.where), self.open() as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return array


def find_arrays(source: Path) -> dict[str, StoredArray]:
    """Look at all arrays of a recording, by name, in a folder in the order that people count in.

    Args:
        source: A ``.npy``, a folder of them, or an ``.npz``.

    Raises:
        UserError: It is none of these, or one of its arrays cannot be read or holds anything but whole numbers.
    """
    if source.suffix == ".npz" and source.is_file():
        return _archived(source)
    return {path.stem: stored_array(path) for path in source_files(source, ".npy")}


def stored_array(path: Path) -> StoredArray:
    """Look at a ``.npy`` file.

    Raises:
        UserError: It cannot be read, or holds anything but whole numbers.
    """
    with _naming(str(path)):
        size = path.stat().st_size
    return _looked_at(str(path), lambda: path.open("rb"), size)


def _archived(source: Path) -> dict[str, StoredArray]:
    with _naming(str(source)):
        archive = zipfile.ZipFile(source)
        members = archive.infolist()
    found: dict[str, StoredArray] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise UserError(f"{source}: holds {name!r}, which is no .npy")
        if name in found:
            raise UserError(f"{source}: holds {name!r} twice")
        where = f"{source}: {name}" if name.isprintable() else f"{source}: {name!r}"
        if member.file_size > max(LARGE, MOST_COMPRESSED * member.compress_size):
            raise UserError(
                f"{where}: unpacks {member.compress_size:,} bytes to {member.file_size:,}, which no recording does; "
                "save it without compression if it is one"
            )
        found[name] = _looked_at(where, partial(archive.open, member), member.file_size)
    if not found:
        raise UserError(f"{source}: holds no array")
    return found


def _looked_at(where: str, opened: Callable[[], AbstractContextManager[IO[bytes]]], size: int) -> StoredArray:
    """Read an array's header, and hold it against the ``size`` in bytes of its ``.npy``."""
    with _naming(where), opened() as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"format version {version}")
        shape, _, dtype = HEADERS[version](file)
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"shape {shape}")
        needed, rest = math.prod(shape) * dtype.itemsize, size - file.tell()
        if not dtype.hasobject and needed != rest:
            raise ValueError(f"its header says {dtype} {shape}, which is {shown(needed)} bytes, but {rest:,} follow")
    if dtype.hasobject:
        raise UserError(f"{where}: holds pickled objects, which are never loaded; save an array of whole numbers")
    if dtype.kind not in "iu" and needed:  # an empty list is saved as an array of no numbers with a fraction
        raise UserError(f"{where}: holds {str(dtype)[:60]}, not whole numbers")
    return StoredArray(where, shape, opened)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn what numpy and zipfile make of a damaged file into a line that names it."""
    try:
        yield
    except Exception as error:  # numpy parses headers as Python, and what that may raise is not written down
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: cannot be read as an array of numpy ({brief(error)})") from error
