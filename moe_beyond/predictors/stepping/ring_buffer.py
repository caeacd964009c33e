"""The last rows of a sequence, for steppers."""

from typing import Any

import numpy as np
import numpy.typing as npt


class RingBuffer:
    """Keeps the last rows in one contiguous array, oldest first.

    The array has twice as many rows as are kept. Only when its end is reached are the kept rows moved to its front.

    Args:
        size: Number of rows that are kept.
        shape: Shape of a row.
        dtype: Data type of the rows (default: float32).
    """

    def __init__(self, size: int, *shape: int, dtype: npt.DTypeLike = np.float32) -> None:
        self._buffer = np.zeros((2 * size, *shape), dtype)
        self._size, self._stop = size, 0

    def append(self, row: npt.ArrayLike) -> None:
        """Append a row; beyond ``size`` rows the oldest is dropped.

        Args:
            row: Row of the buffer's shape.
        """
        if self._stop == len(self._buffer):
            self._buffer[: self._size] = self._buffer[self._size :]
            self._stop = self._size
        self._buffer[self._stop] = row
        self._stop += 1

    @property
    def rows(self) -> npt.NDArray[Any]:
        """Kept rows ``(n, ...)``, a view that is valid until the next `append`."""
        return self._buffer[max(0, self._stop - self._size) : self._stop]
