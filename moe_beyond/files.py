"""Writing files and folders so that nobody ever finds a half-written one."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.fields import is_plain_name, shown

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a file without room: a full disk, a quota, a limit of file sizes."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The error number in messages of libraries written in Rust, such as safetensors."""
SEAL = "content_sha256"
"""The field of a JSON object that holds a hash of all others."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` on success, delete it on any error.

    The file is flushed to the disk before it is renamed, and its folder after: even a power cut leaves the earlier file
    or the later one.

    Raises:
        UserError: There is no room for it.
    """
    path = Path(path)
    with _naming_what_has_no_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def creating(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path as `replacing` does, for a file that must not be there yet.

    Raises:
        UserError: ``path`` exists.
    """
    if Path(path).exists():
        raise UserError(f"{path} already exists; choose another name or remove it")
    with replacing(path) as temporary:
        yield temporary


@contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder next to ``path``; rename it to ``path`` on success, delete it on any error.

    Args:
        path: The folder to make.
        overwrite: Replace a folder that is already there, instead of refusing.

    Raises:
        UserError: ``path`` exists, is not an empty folder, and ``overwrite`` is off; this process works inside it;
            or there is no room.
    """
    path = Path(path)
    if not overwrite:
        check_is_free(path)
    check_is_elsewhere(path)
    with _naming_what_has_no_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):  # libraries write some files for their owner alone
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            if path.is_dir() and overwrite:
                aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.replace(aside)
                temporary.replace(path)
                shutil.rmtree(aside)
            else:
                if path.is_dir():
                    path.rmdir()  # empty, or somebody filled it meanwhile, and it stays
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_taken(folder: Path) -> bool:
    """Tell whether a folder cannot be made at a path: something other than an empty folder is there already."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def check_is_free(folder: Path) -> None:
    """Refuse to make a folder where there is something already.

    Raises:
        UserError: There is.
    """
    if is_taken(folder):
        raise UserError(f"{folder} already exists; choose another folder or remove it")


def check_is_elsewhere(path: Path) -> None:
    """Refuse to make a folder that this process works inside.

    Raises:
        UserError: It does.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: the folder to make cannot be the present one or one above it; choose another")


def is_earlier_result(folder: str | Path, marker: str, *names: str) -> bool:
    """Tell whether a folder is one that this package made before, with nothing of the user's in it.

    Args:
        folder: The folder; it need not exist.
        marker: The file by which such a folder is known.
        *names: Patterns of whatever else may lie there.
    """
    found = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    return marker in found and all(any(fnmatchcase(name, known) for known in (marker, *names)) for name in found)


def file_sha256(path: str | Path) -> str:
    """Return the hash of a file, in hexadecimal digits, without reading it into memory as a whole."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON with a final newline, atomically; the same content gives the same bytes."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is missing, is no regular file, or is not JSON.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # reading a pipe may never end
            raise UserError(f"{path}: cannot be read (not a regular file)")
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null byte
        raise UserError(f"{shown(str(path))}: is not the name of a file ({error})") from error
    return parse_json(content, path)


def parse_json(content: bytes, source: str | Path) -> Any:
    """Read JSON in UTF-8, with or without a byte order mark.

    Args:
        content: The file.
        source: Path or name of the origin, for error messages.

    Raises:
        UserError: It is not JSON, or an object has a key twice, of which readers take the one or the other.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(f"{source}: key {shown(repeated)} is there twice in one object; remove one of them")
        return fields

    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets without end
        raise UserError(f"{source}: is not JSON ({error})") from error


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add a hash of all other fields to a JSON object, by which `check_seal` notices a change of any of them."""
    return {**content, SEAL: _seal_of(content)}


def check_seal(content: Mapping[str, Any], source: str | Path, remedy: str) -> None:
    """See that an object is what `sealed` returned.

    Args:
        content: The object.
        source: Path or name of the origin, for error messages.
        remedy: Advice for a changed file.

    Raises:
        UserError: A field was changed since.
    """
    if content.get(SEAL) != _seal_of(content):
        raise UserError(f"{source}: {SEAL} and the other fields do not agree: one was damaged or edited; {remedy}")


def _seal_of(content: Mapping[str, Any]) -> str:
    others = {name: value for name, value in content.items() if name != SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def file_in(folder: str | Path, name: str) -> Path:
    """Return the path of a file in a folder.

    A link that leads out of the folder is refused, but for one to the ``blobs`` of the Hub's cache, which hold the
    files of a snapshot.

    Args:
        folder: The folder.
        name: Name of the file, which need not exist.

    Raises:
        UserError: The name is a path, the file is outside the folder, or it is not a regular file.
    """
    path = Path(folder) / name
    if not is_plain_name(name):
        raise UserError(f"{folder}: {shown(name)} is not the name of a file in this folder")
    try:
        root, target = Path(folder).resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a link that leads nowhere") from error
    except ValueError as error:  # a null byte
        raise UserError(f"{shown(str(folder))}: is not the name of a folder ({error})") from error
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if target.parent not in allowed:
        raise UserError(f"{path}: is a link to a file outside of the folder; put the file itself there")
    if target.exists() and not target.is_file():
        raise UserError(f"{path}: is not a regular file")
    return path


@contextmanager
def _naming_what_has_no_room(path: Path) -> Iterator[None]:
    """Turn the system's error about a full disk, which names no file, into a line that names it."""
    try:
        yield
    except Exception as error:
        written = OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(written[1]) if written else None
        if number not in FULL or isinstance(error, UserError):
            raise
        reason = os.strerror(number)
        raise UserError(f"{path}: cannot be written ({reason}); make room, then run the same command again") from error


def _flush(path: Path) -> None:
    """Let the disk take a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
