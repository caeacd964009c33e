"""Atomic writes of files and folders, and JSON files."""

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.json_fields import is_plain_name
from moe_beyond.safe_text import shown
from moe_beyond.unfinished import exchange, unfinished_folder

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a full disk, a quota, and a limit of file sizes."""
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)
"""Error numbers of a file system that cannot flush folders."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""Error number in messages of libraries written in Rust, such as safetensors."""
SEAL = "content_sha256"
"""Field of a JSON object with a hash of all other fields."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in a hidden folder next to ``path``; move it to ``path`` on success, else delete it.

    The file is flushed to the disk before it is moved, and its folder afterwards: a power cut leaves either the old
    file or the new one. What a killed process leaves is removed by the next process that writes into the same folder.

    Args:
        path: File to write.

    Raises:
        UserError: The disk is full.
    """
    path = Path(path)
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(path) as hidden:
            temporary = hidden / path.name
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
            move(temporary, path)


@contextmanager
def creating(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path as `replacing` does, for a file that must not exist.

    Raises:
        UserError: ``path`` exists.
    """
    if Path(path).exists():
        raise UserError(f"{path} already exists; choose another name or remove it")
    with replacing(path) as temporary:
        yield temporary


@contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder as `replacing` yields a file; its files are flushed to the disk, too.

    A folder that exists is exchanged for the new one in one step, where the file system can do that.

    Args:
        path: Folder to write.
        overwrite: Replace a folder that exists (default: False, which refuses it).

    Raises:
        UserError: ``path`` exists, is not an empty folder, and ``overwrite`` is False; it is or contains the working
            folder of this process; another process writes there meanwhile; or the disk is full.
    """
    path = Path(path)
    if not overwrite:
        check_is_free(path)
    check_is_elsewhere(path)
    if path.is_symlink():  # the folder is replaced, not the link to it
        path = path.resolve()
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(path) as hidden:
            temporary = hidden / path.name
            temporary.mkdir()
            yield temporary
            mask = _umask()
            for each in (*temporary.rglob("*"), temporary):
                if not each.is_symlink():  # libraries make some files readable only by their owner
                    each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)
                    _flush(each)
            if path.is_dir() and overwrite:
                exchange(temporary, path)
                _flush(path.parent)
            else:
                _move_to_free(temporary, path)


def _move_to_free(temporary: Path, folder: Path) -> None:
    """Move a folder to a path that was free before, or an empty folder.

    Raises:
        UserError: Another process has written there since.
    """
    try:
        move(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"{folder}: another process has written there meanwhile; choose another folder, and run again"
        ) from error


def move(source: Path, target: Path) -> None:
    """Rename a file or folder that is on the disk, so that a power cut leaves its old or its new name.

    Args:
        source: File or folder, flushed to the disk.
        target: New path; a file or an empty folder there is replaced.

    Raises:
        OSError: The path cannot be renamed.
    """
    source.replace(target)
    _flush(target.parent)


def is_taken(folder: Path) -> bool:
    """Return whether a path exists and is not an empty folder, so that no folder can be written there."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def check_is_free(folder: Path) -> None:
    """Refuse to write a folder over an existing file or folder.

    Args:
        folder: Folder to write.

    Raises:
        UserError: The path exists and is not an empty folder.
    """
    if is_taken(folder):
        raise UserError(f"{folder} already exists; choose another folder or remove it")


def check_is_elsewhere(path: Path) -> None:
    """Refuse to replace the working folder of this process or a folder that contains it.

    Args:
        path: Folder to write.

    Raises:
        UserError: The working folder is ``path`` or inside it.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: is or contains the working folder; choose another folder")


def is_earlier_result(folder: str | Path, marker: str, *patterns: str) -> bool:
    """Return whether this package wrote a folder, and the user added no files to it.

    Args:
        folder: Folder, which need not exist.
        marker: Name of a file that every such folder has.
        *patterns: Patterns of the names of its other files.
    """
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    expected = (marker, *patterns)
    return marker in names and all(any(fnmatchcase(name, pattern) for pattern in expected) for name in names)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 hash of a file as hexadecimal digits; the file is read in parts."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically: indented, with a final newline; the same content gives the same bytes."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is missing, is not a regular file, or is not JSON.
    """
    return parse_json(_read(path), path)


def read_text(path: str | Path) -> str:
    """Read a text file.

    Raises:
        UserError: The file is missing, is not a regular file, or is not UTF-8.
    """
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def _read(path: str | Path) -> bytes:
    try:
        if Path(path).exists() and not Path(path).is_file():  # reading a pipe may never end
            raise UserError(f"{path}: cannot be read (not a regular file)")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null byte
        raise UserError(f"{shown(str(path))}: is not a file name ({error})") from error


def parse_json(content: bytes, source: str | Path) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Args:
        content: Bytes of the file.
        source: Path or name of the origin, for error messages.

    Raises:
        UserError: The content is not JSON, or an object contains a key twice, which readers resolve differently.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(f"{source}: an object has key {shown(repeated)} twice; remove one of them")
        return fields

    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # RecursionError: endlessly nested brackets
        raise UserError(f"{source}: is not JSON ({error})") from error


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a hash of all its fields, with which `check_seal` detects changes."""
    return {**content, SEAL: _seal_of(content)}


def check_seal(content: Mapping[str, Any], source: str | Path, remedy: str) -> None:
    """Check that an object is unchanged since `sealed` returned it.

    Args:
        content: JSON object with a hash.
        source: Path or name of the origin, for error messages.
        remedy: Advice for a changed file.

    Raises:
        UserError: A field has changed.
    """
    if content.get(SEAL) != _seal_of(content):
        raise UserError(
            f"{source}: {SEAL} does not match the other fields, so the file was damaged or edited; {remedy}"
        )


def _seal_of(content: Mapping[str, Any]) -> str:
    # Names that are numbers become text, so that the fields have the same order when they are read.
    others = json.loads(json.dumps({name: value for name, value in content.items() if name != SEAL}))
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def file_in(folder: str | Path, name: str) -> Path:
    """Return the path of a file in a folder.

    A link out of the folder is refused, except into the ``blobs`` of the Hub's cache: the files of a snapshot.

    Args:
        folder: Folder of the file.
        name: Name of the file, which need not exist.

    Raises:
        UserError: The name is a path, the file is outside the folder, or it is not a regular file.
    """
    path = Path(folder) / name
    if not is_plain_name(name):
        raise UserError(f"{folder}: {shown(name)} is not a file name")
    try:
        root, target = Path(folder).resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a broken link") from error
    except ValueError as error:  # a null byte
        raise UserError(f"{shown(str(folder))}: is not a folder name ({error})") from error
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if target.parent not in allowed:
        raise UserError(f"{path}: is a link to a file outside the folder; replace it by the file")
    if target.exists() and not target.is_file():
        raise UserError(f"{path}: is not a regular file")
    return path


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's error about a full disk into an error with the name of the file.

    Args:
        path: File or folder that is written.

    Raises:
        UserError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        match = OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if number not in NO_SPACE or isinstance(error, UserError):
            raise
        reason = os.strerror(number)
        raise UserError(
            f"{path}: cannot be written ({reason}); free some space, then run the same command again"
        ) from error


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to, but not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
