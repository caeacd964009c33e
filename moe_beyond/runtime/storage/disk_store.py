"""The store of experts in files: each contiguous range is one read, scattered into the slab."""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import PAGE, Bytes
from moe_beyond.runtime.storage.expert_index import Conversion, ExpertIndex, Piece, Segment
from moe_beyond.runtime.storage.store import BytesBySource

MOST_BUFFERS = os.sysconf("SC_IOV_MAX")
"""Limit of the system for the buffers of one read."""
NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""Flag of a read that returns only what is in memory; 0 on systems without it."""


class DiskStore:
    """Experts in safetensors files, read with `preadv`.

    The first attempt at a range returns the pages that are in memory. All bytes from the first absent page on count as
    read from the disk.

    Args:
        index: Places of the experts.
        direct_io: Whether reads bypass the page cache (default: False).

    Attributes:
        nbytes: Staging buffers of direct I/O, in bytes; one per thread that has read.

    Raises:
        UserError: A file cannot be opened, or does not allow direct I/O.
    """

    in_memory = False

    def __init__(self, index: ExpertIndex, *, direct_io: bool = False) -> None:
        self.layouts = index.layouts
        self.nbytes = 0
        self._index = index
        self._direct = direct_io
        self._threads = threading.local()
        self._lock = threading.Lock()
        self._files: list[_File] = []
        try:
            for path in index.files:
                self._files.append(_File(path, direct_io=direct_io))
        except BaseException:
            self.close()
            raise

    def read(self, expert: int, slab: Bytes) -> BytesBySource:
        """Write an expert into a slab; several threads may read at once, and the GIL is released meanwhile.

        Args:
            expert: Expert ``layer * E + expert``.
            slab: Memory of at least ``layout.stride`` bytes; direct I/O is fastest if it begins at a page.

        Raises:
            UserError: A file has changed since the store was opened, is truncated, or cannot be read.
        """
        entry = self._index.entries[expert]
        cached = total = 0
        for segment in entry.segments:
            cached += self._fill(expert, segment, slab)
            total += segment.length
        for conversion in entry.conversions:
            read = self._compute(expert, conversion, slab)
            cached, total = cached + read.page_cache, total + read.page_cache + read.disk
        return BytesBySource(page_cache=cached, disk=total - cached)

    def describe(self, expert: int) -> str:
        """Name an expert and its file, for error messages."""
        return self._index.describe(expert)

    def close(self) -> None:
        """Close all files; no thread may read meanwhile."""
        for file in self._files:
            file.close()
        self._files = []

    def _fill(self, expert: int, segment: Segment, memory: Bytes) -> int:
        """Read one contiguous range; return the number of bytes that were in memory."""
        file = self._files[segment.file]
        try:
            cached = self._fill_direct(file, segment, memory) if self._direct else _fill_cached(file, segment, memory)
        except (OSError, EOFError) as error:
            file.check_unchanged()
            reason = error.strerror if isinstance(error, OSError) else "it is truncated"
            raise UserError(
                f"{file.path}: {self.describe(expert)} cannot be read ({reason}); check the disk and the file"
            ) from error
        file.check_unchanged()
        return cached

    def _fill_direct(self, file: "_File", segment: Segment, memory: Bytes) -> int:
        piece = segment.pieces[0]
        target = memory[piece.offset : piece.offset + piece.length]
        whole_pages = segment.offset % PAGE == segment.length % PAGE == target.ctypes.data % PAGE == 0
        if len(segment.pieces) == 1 and whole_pages:
            _read_pages(file, segment.offset, target, segment.length)
            return 0
        skipped = segment.offset % PAGE
        staging = self._staging(-(-(skipped + segment.length) // PAGE) * PAGE)
        _read_pages(file, segment.offset - skipped, staging, skipped + segment.length)
        position = skipped
        for offset, length in segment.pieces:
            memory[offset : offset + length] = staging[position : position + length]
            position += length
        return 0

    def _staging(self, size: int) -> Bytes:
        """Return a buffer of this thread that begins at a page."""
        buffer: Bytes | None = getattr(self._threads, "buffer", None)
        if buffer is None or len(buffer) < size:
            with self._lock:
                self.nbytes += size - (0 if buffer is None else len(buffer))
            self._threads.buffer = buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        return buffer[:size]

    def _compute(self, expert: int, conversion: Conversion, slab: Bytes) -> BytesBySource:
        """Read the sources of a parameter, convert them, and copy the result into the slab."""
        cached = total = 0
        values = []
        for source in conversion.sources:
            size = int(np.prod(source.shape)) * source.dtype.itemsize
            stored = np.empty(size, np.uint8)
            cached += self._fill(expert, Segment(source.file, source.offset, size, (Piece(0, size),)), stored)
            total += size
            value = torch.from_numpy(stored).view(source.dtype).view(source.shape)
            values.append(value.to(conversion.field.dtype))
        field = conversion.field
        row = conversion.convert(values).to(field.dtype).contiguous()
        slab[field.offset : field.offset + field.nbytes] = row.view(-1).view(torch.uint8).numpy()
        return BytesBySource(page_cache=cached, disk=total - cached)


class _File:
    """An open file, and its state when it was opened.

    Args:
        path: Path of the file.
        direct_io: Whether reads bypass the page cache.

    Raises:
        UserError: The file cannot be opened, or does not allow direct I/O.
    """

    def __init__(self, path: Path, *, direct_io: bool) -> None:
        self.path = path
        self.no_wait = NO_WAIT
        try:
            self.handle = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct_io else 0))
        except OSError as error:
            if direct_io and error.errno == errno.EINVAL:
                raise UserError(
                    f"{path}: its file system does not support direct I/O; leave direct I/O out, or move the model"
                ) from error
            raise UserError(
                f"{path}: cannot be opened (got {error.strerror}); check the file and its permissions"
            ) from error
        self._state = _state(os.fstat(self.handle))

    def check_unchanged(self) -> None:
        """Refuse a file that was changed, replaced or removed since it was opened.

        Raises:
            UserError: The file is another one.
        """
        try:
            unchanged = _state(os.stat(self.path)) == self._state
        except OSError:
            unchanged = False
        if not unchanged:
            raise UserError(f"{self.path}: has changed since the model was loaded; load the model again")

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)


def _state(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _fill_cached(file: _File, segment: Segment, memory: Bytes) -> int:
    """Read a range through the page cache; return the number of bytes that were in it."""
    view = memory.data
    buffers: Sequence[memoryview] = [view[offset : offset + length] for offset, length in segment.pieces]
    position, cached, flags = segment.offset, 0, file.no_wait
    while buffers:
        try:
            count = os.preadv(file.handle, buffers[:MOST_BUFFERS], position, flags)
        except BlockingIOError:  # the next page is not in memory
            flags = 0
            continue
        except OSError as error:
            if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            file.no_wait = flags = 0  # the file system lacks the flag
            continue
        if not count:
            raise EOFError
        cached += count if flags else 0
        position += count
        buffers = _after(buffers, count)
    return cached


def _after(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """Return the buffers after the first ``count`` bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []


def _read_pages(file: _File, offset: int, target: Bytes, needed: int) -> None:
    """Read whole pages until the needed bytes are there; the last page of a file may be short.

    Raises:
        EOFError: The file ends earlier.
    """
    done = 0
    while done < needed:
        count = os.preadv(file.handle, [target[done:].data], offset + done)
        if done + count >= needed:
            return
        if count < PAGE:
            raise EOFError
        done = (done + count) // PAGE * PAGE
