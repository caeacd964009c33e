"""A cache of downloaded files, bounded and shared by all processes of a user.

A file is named by its hash, so it never changes and no two sets disagree. It is written under a temporary name. Locks
let one process download it while others wait. The files that were used longest ago are removed when the
cache exceeds its limit; a process that reads a removed file has it open, or downloads it again.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moe_beyond.errors import UserError
from moe_beyond.files import replacing

FOLDER, LIMIT = "MOE_BEYOND_CACHE", "MOE_BEYOND_CACHE_GB"
"""Environment variables for the folder of the cache and its size."""
DEFAULT_LIMIT_GB = 10.0
LOCKS = ".locks"
OLD_S = 86400
"""Age of temporary files that are removed."""


class FileCache:
    """Files by their hash.

    Args:
        folder: Folder of the cache (default: ``MOE_BEYOND_CACHE``, otherwise ``~/.cache/moe-beyond``).
        limit: Largest size in bytes (default: ``MOE_BEYOND_CACHE_GB``, otherwise 10 GB).

    Raises:
        UserError: The variable holds no size.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "moe-beyond")
        self.limit = _limit() if limit is None else limit

    def get(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """Return the content of a file.

        Args:
            sha256: Hash of the file.
            fetch: Function that downloads it.
        """
        path = self.folder / sha256
        try:
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCKS / f"{sha256[:2]}.lock")  # at most 256 files, which stay
            lock.acquire()
        except (OSError, Timeout) as error:
            _note(f"{self.folder}: cannot be written ({error}); shards are downloaded whenever they are read")
            return fetch()
        with lock:
            with suppress(OSError):
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == sha256:  # otherwise the disk has damaged it
                    os.utime(path)
                    return content
            content = fetch()
            try:
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
                self._evict(keep=path)
            except (OSError, UserError) as error:
                _note(f"{self.folder}: cannot be written ({error}); shards are downloaded whenever they are read")
            return content

    def _evict(self, keep: Path) -> None:
        """Remove the files that were used longest ago, except one."""
        with FileLock(self.folder / LOCKS / "evict.lock"):
            files = []
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if path.name.startswith("."):
                        if path.is_file() and status.st_mtime < time.time() - OLD_S:  # left by a killed process
                            path.unlink()
                    else:
                        files.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= self.limit:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= size


def _limit() -> int:
    text = os.environ.get(LIMIT, str(DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise UserError(f"{LIMIT}: must be a size in gigabytes (got {text!r}); set 10, for example")
    return int(limit * 1e9)


_noted: set[str] = set()


def _note(line: str) -> None:
    """Print a line once."""
    if line not in _noted:
        _noted.add(line)
        print(f"moe-beyond: {line}", file=sys.stderr)
