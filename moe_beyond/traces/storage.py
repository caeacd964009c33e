"""Files of a trace set in a folder, on the Hub or in an object store.

A file of an object store is downloaded once per machine, into a cache that names files by their hash
(`moe_beyond.traces.file_cache`). Requests that fail are repeated, with growing pauses.
"""

import hashlib
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fsspec

from moe_beyond.download import HubName, download, is_hub_name, parse_hub_name
from moe_beyond.errors import UserError
from moe_beyond.files import file_in
from moe_beyond.safe_text import brief
from moe_beyond.traces.file_cache import FileCache
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE
from moe_beyond.urls import without_secrets

ON_THIS_MACHINE = ("file", "local", "memory")
"""Protocols whose files need no cache."""
INSTALLED_BY = {"s3": "s3fs, as 'moe-beyond[s3]' does", "s3a": "s3fs, as 'moe-beyond[s3]' does", "gs": "gcsfs",
                "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}  # fmt: skip
"""Package of each protocol that this package does not require."""
ATTEMPTS, FIRST_PAUSE_S = 5, 0.5
"""Attempts of a request, and the mean pause after the first failure; every further pause is twice as long."""
LASTING = (FileNotFoundError, NotADirectoryError, PermissionError)
"""Failures that another attempt does not change."""


class Storage:
    """Reader of the files of a trace set.

    Args:
        place: Path, ``hf:ORG/REPO@REVISION``, or a URL that fsspec understands.
        name: Name of the set in errors.

    Raises:
        UserError: The place has an unknown form, or its package is not installed.
    """

    def __init__(self, place: str, name: str) -> None:
        self.name = name
        self._hub = parse_hub_name(place) if is_hub_name(place) else None
        place = place if self._hub is None else str(_download(self._hub))
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except ImportError as error:
            protocol = place.partition("://")[0]
            package = INSTALLED_BY.get(protocol, f"the package of fsspec for {protocol}")
            raise UserError(f"{name}: {protocol}:// is read by another package; install {package}") from error
        except ValueError as error:
            raise UserError(f"{name}: cannot be opened ({brief(error)})") from error
        protocols = self._files.protocol
        protocols = (protocols,) if isinstance(protocols, str) else protocols
        self._local = "file" in protocols
        self._remote = not any(protocol in ON_THIS_MACHINE for protocol in protocols)
        self._cache = FileCache() if self._remote else None
        self._ahead: dict[str, Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the thread, which no other process can continue."""
        return {**self.__dict__, "_ahead": {}, "_pool": None}

    def read(self, file: str) -> bytes:
        """Read a file, such as the manifest, whose hash is unknown.

        Args:
            file: Name of the file.

        Raises:
            FileNotFoundError: The file does not exist.
            UserError: The file cannot be read, or is outside the folder.
        """
        return self._repeated(file, lambda content: True)

    def read_verified(self, file: str, sha256: str, kind: str = "shard") -> bytes:
        """Read a file, and verify its hash.

        Args:
            file: Name of the file.
            sha256: Hash of the file.
            kind: Kind of the file, for errors (default: shard).

        Raises:
            UserError: The file is missing, cannot be read, or has another hash.
        """
        ahead = self._ahead.pop(sha256, None)
        return self._read_verified(file, sha256, kind) if ahead is None else ahead.result()

    def _read_verified(self, file: str, sha256: str, kind: str = "shard") -> bytes:
        path = f"{self.name}/{file}"

        def fetch() -> bytes:
            content = self._repeated(file, lambda content: _sha256(content) == sha256)
            if _sha256(content) != sha256:
                raise UserError(f"{path}: {kind} is damaged (its sha256 is not the one in {MANIFEST_FILE})")
            return content

        try:
            return fetch() if self._cache is None else self._cache.get(sha256, fetch)
        except FileNotFoundError as error:
            raise UserError(f"{path}: {kind} named in {MANIFEST_FILE} is missing") from error

    def read_ahead(self, file: str, sha256: str) -> None:
        """Begin to read a file of an object store, for the next `read_verified`.

        Args:
            file: Name of the file.
            sha256: Hash of the file.
        """
        if self._remote and sha256 not in self._ahead:
            self._pool = self._pool or ThreadPoolExecutor(1)
            self._ahead[sha256] = self._pool.submit(self._read_verified, file, sha256)

    def fetch_optional(self, file: str) -> None:
        """Download a file of a set on the Hub that is not downloaded with the others."""
        if self._hub is not None and not self._files.exists(f"{self._root}/{file}"):
            commit = self._root.rpartition("/")[2]
            download(HubName(self._hub.repository, commit), "dataset", (file,))

    def _repeated(self, file: str, whole: Callable[[bytes], bool]) -> bytes:
        """Read a file; repeat what fails, and what is not whole, in an object store."""
        path, attempts = f"{self.name}/{file}", ATTEMPTS if self._remote else 1
        if self._local:
            file_in(self._root, file)
        for attempt in range(1, attempts + 1):
            try:
                content: bytes = self._files.cat_file(f"{self._root}/{file}")
            except LASTING as error:
                if isinstance(error, PermissionError):
                    raise UserError(f"{path}: cannot be read ({_reason(error)})") from error
                raise FileNotFoundError(path) from error
            except Exception as error:  # every file system has its own errors
                if attempt == attempts:
                    times = f" {attempts} times" if attempts > 1 else ""
                    raise UserError(f"{path}: cannot be read{times} ({_reason(error)})") from error
            else:
                if attempt == attempts or whole(content):
                    return content
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # nosec B311 # no secret
        raise AssertionError("the last attempt returns or raises")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _reason(error: Exception) -> str:
    """Return the message of a library without the secrets of URLs."""
    return brief(without_secrets(str(error)) or error)


def _download(name: HubName) -> str:
    """Download a trace set and print its revision."""
    folder = download(name, "dataset", (MANIFEST_FILE,), (TOKENIZER_FILE, "*.parquet"))
    print(f"{name} is {folder.name}", file=sys.stderr)
    return str(folder)
