"""Time of reads of the size of an expert, through the page cache or directly from the disk."""

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import PAGE

DIRECT = getattr(os, "O_DIRECT", 0)
"""Flag of a file that is read without the page cache; 0 on systems without it."""


def read_seconds(
    files: Sequence[Path], size: int, *, readers: int, reads: int, repeats: int, direct: bool
) -> list[float] | None:
    """Measure reads at random places of files.

    Args:
        files: Files of at least ``size`` bytes, at least one.
        size: Size of a read in bytes, a multiple of `PAGE`.
        readers: Number of threads that read at once.
        reads: Number of reads per repeat.
        repeats: Number of repeats.
        direct: Whether reads bypass the page cache. Otherwise all ranges are read once before the first repeat.

    Returns:
        Seconds per read of each repeat: the time of all reads divided by their number. None if the files do not allow
        direct reads.

    Raises:
        UserError: A file cannot be read.
    """
    if direct and not DIRECT:
        return None
    rng = np.random.default_rng(0)
    jobs = [(number % readers, files[int(rng.integers(len(files)))], rng.random()) for number in range(reads)]
    buffers = [mmap.mmap(-1, size) for _ in range(readers)]
    for buffer in buffers:
        buffer.write(bytes(size))  # memory that was never written has no pages yet

    def read(job: tuple[int, Path, float]) -> None:
        buffer, file, place = job
        descriptor = os.open(file, os.O_RDONLY | (DIRECT if direct else 0))
        try:
            os.preadv(descriptor, [buffers[buffer]], int(place * (file.stat().st_size - size)) // PAGE * PAGE)
        finally:
            os.close(descriptor)

    try:
        found = []
        with ThreadPoolExecutor(readers) as pool:
            for repeat in range(repeats + (not direct)):
                began = time.perf_counter()
                list(pool.map(read, jobs))
                if direct or repeat:
                    found.append((time.perf_counter() - began) / reads)
        return found
    except OSError as error:
        if direct:
            return None
        raise UserError(f"{files[0].parent}: cannot be read ({error.strerror})") from error
