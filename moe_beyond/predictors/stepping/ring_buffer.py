"""The last rows of something, for steppers: without moving all of them whenever one comes."""

from typing import Any

import numpy as np
import numpy.typing as npt


class RingBuffer:
    """Keeps the last rows, oldest first.

    They lie in a buffer of twice their number, and move to its front only when its end is reached.

    Args:
        most: How many are kept.
        shape: Of a row.
        dtype: Of its numbers.
    """

    def __init__(self, most: int, *shape: int, dtype: npt.DTypeLike = np.float32) -> None:
        self._buffer = np.zeros((2 * most, *shape), dtype)
        self._most, self._stop = most, 0

    def append(self, row: npt.ArrayLike) -> None:
        """Add a row; beyond ``most`` the oldest goes."""
        if self._stop == len(self._buffer):
            self._buffer[: self._most] = self._buffer[self._most :]
            self._stop = self._most
        self._buffer[self._stop] = row
        self._stop += 1

    @property
    def rows(self) -> npt.NDArray[Any]:
        """``(n, ...)``, a view that is good until the next row comes."""
        return self._buffer[max(0, self._stop - self._most) : self._stop]
