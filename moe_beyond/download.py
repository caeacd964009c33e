"""Downloads from the Hugging Face Hub, by names like ``hf:ORG/REPO@REVISION``; only expected files are downloaded."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_beyond.errors import UserError, nearest
from moe_beyond.safe_text import brief, shown

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["model", "dataset"]
"""Kind of a predictor's repository, and of a trace set's."""

PREFIX = "hf:"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
REVISION = re.compile(r"[!-~]+")
"""Printable ASCII without spaces; the Hub knows the rules for branches and tags."""
COMMIT = re.compile("[0-9a-f]{40}")

FILE_SUFFIXES = frozenset(
    ".txt .json .jsonl .ndjson .csv .tsv .parquet .safetensors .gguf .bin .pt .pth .ckpt .yaml .yml .zip .gz .zst .md "
    ".py .npz .npy".split()
)
"""Suffixes of local files; hardly any repository of the Hub ends with one."""


@dataclass(frozen=True)
class HubName:
    """Repository of the Hub at a revision.

    Attributes:
        repository: Name of the repository, ``ORG/REPO``.
        revision: Branch, tag or commit.
    """

    repository: str
    revision: str

    def __str__(self) -> str:
        """Return the name in the form that `parse_hub_name` reads."""
        return f"{PREFIX}{self.repository}@{self.revision}"


def is_hub_name(name: str) -> bool:
    """Return whether a name refers to the Hub; ``hf://...`` is a URL that fsspec reads."""
    return name.startswith(PREFIX) and not name.startswith(f"{PREFIX}//")


def parse_hub_name(name: str) -> HubName:
    """Read ``hf:ORG/REPO`` or ``hf:ORG/REPO@REVISION``.

    Raises:
        UserError: The name has another form.

    Example:
        >>> parse_hub_name("hf:org/repo@v1")
        HubName(repository='org/repo', revision='v1')
    """
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    if not is_hub_name(name) or not REPOSITORY.fullmatch(repository) or (at and not REVISION.fullmatch(revision)):
        raise UserError(f"{shown(name)}: write hf:ORG/REPO or hf:ORG/REPO@REVISION")
    return HubName(repository, revision or "main")


def download(name: HubName, kind: Kind, required: Sequence[str], optional: Sequence[str] = ()) -> Path:
    """Download files of a repository, or find them in the Hub's local cache.

    Args:
        name: Repository and revision.
        kind: Kind of the repository.
        required: Files that the repository must have.
        optional: Patterns of further files to download (default: none).

    Returns:
        Folder in the Hub's cache, named after the commit. Do not write to it.

    Raises:
        UserError: There is no such repository, it lacks a required file, or the Hub is unreachable.
    """
    folder = snapshot(name, kind, [*required, *optional])
    for file in required:
        if not (folder / file).is_file():
            raise UserError(f"{name}: has no {file}; is it a repository of this package?")
    return folder


def snapshot(name: HubName, kind: Kind, patterns: Sequence[str], *, shown: str | None = None) -> Path:
    """Download the files of a repository whose names match, or find them in the Hub's local cache.

    Args:
        name: Repository and revision.
        kind: Kind of the repository.
        patterns: Shell patterns of file names.
        shown: Name in error messages (default: ``hf:ORG/REPO@REVISION``).

    Returns:
        Folder in the Hub's cache, named after the commit. Do not write to it.

    Raises:
        UserError: There is no such repository, or the Hub is unreachable.
    """
    with hub_errors(shown or str(name)):
        from huggingface_hub import snapshot_download

        unreachable = _unreachable(name, kind) if COMMIT.fullmatch(name.revision) else None
        try:
            folder = snapshot_download(
                name.repository,
                repo_type=kind,
                revision=name.revision,
                allow_patterns=list(patterns),
                local_files_only=unreachable is not None,
            )
        except FileNotFoundError as error:
            if unreachable is None:
                raise
            raise unreachable from error
        return Path(folder)


def _unreachable(name: HubName, kind: Kind) -> Exception | None:
    """Send one request to the Hub; return the error that prevents an answer, None if it answers.

    For a branch or a tag, the library sends such a request before it lists files. For a commit, it lists files at once,
    with six attempts in half a minute.
    """
    from httpx2 import ConnectError, TimeoutException
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().repo_info(name.repository, repo_type=kind, revision=name.revision)
    except (ConnectError, TimeoutException, OfflineModeIsEnabled) as error:
        return error
    except HfHubHTTPError:
        return None  # listing the files reports it too, and the cache may have the files
    return None


def looks_local(name: str) -> bool:
    """Return whether a name is a path on this machine, so that no request to the Hub is needed.

    A path begins with ``/``, ``./``, ``../`` or ``~``, has more than one ``/``, has a suffix of `FILE_SUFFIXES`, or has
    a parent folder that exists.

    Args:
        name: Name that the user gave.

    Example:
        >>> [looks_local(name) for name in ("./org/model", "a/b/c", "prompts.csv", "org/model")]
        [True, True, True, False]
    """
    path = Path(name)
    if name.startswith((".", "~", "/", os.sep)) or name.count("/") > 1 or path.suffix.lower() in FILE_SUFFIXES:
        return True
    return len(path.parts) > 1 and path.parent.is_dir()


def no_such_file(name: str, kind: str, *, hint: str = "") -> UserError:
    """Build the error for a path that does not exist, with the nearest existing path.

    Args:
        name: Path that the user gave.
        kind: Expected kind, such as ``"folder"``.
        hint: Advice if there is no near path (default: none).
    """
    if (near := near_path(name)) is not None:
        return UserError(f"{name}: there is no such {kind}; did you mean {near}?")
    return UserError(f"{name}: there is no such {kind}" + (f"; {hint}" if hint else ""))


def near_path(name: str) -> Path | None:
    """Return the existing path with the spelling nearest to a missing one; None if there is none."""
    path = Path(name).expanduser()
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    try:
        near = nearest(missing.name, os.listdir(missing.parent))
    except OSError:
        return None
    candidate = missing.parent / near / path.relative_to(missing) if near else None
    return candidate if candidate is not None and candidate.exists() else None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the Hub and of the connection into one line; show progress only on a terminal.

    Args:
        name: Name that the user gave.

    Raises:
        UserError: The Hub refuses a request, or is unreachable.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import EntryNotFoundError, FileMetadataError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    refused = (HTTPError, OfflineModeIsEnabled, EntryNotFoundError, FileMetadataError)
    hides = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    except (*refused, ValueError, RuntimeError) as error:  # the last two: bad names and cards, failed transfers
        raise UserError(f"{name}: {_reason(error)}") from error
    finally:
        if hides:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    """Return the reason of an error of the library, which wraps the answer of the Hub."""
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _answer(cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return "is not in the local cache, and HF_HUB_OFFLINE forbids requests to the Hub; unset it"
        if isinstance(cause, TransportError):
            return f"the Hub is unreachable at {constants.ENDPOINT} ({brief(cause)}); try again"
        cause = cause.__cause__
    return brief(error)


def _answer(error: "HfHubHTTPError") -> str:
    """Return the answer of the Hub and a remedy."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status, message = error.response.status_code, brief(error.server_message or "no reason given")
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision; name a branch, a tag or a commit"
    if isinstance(error, GatedRepoError):
        return "is gated; request access on its page"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository of this kind, or it is private; in that case {log_in}"
    if status == 401:
        return f"the Hub does not accept the token; {log_in}" if get_token() else f"the Hub requires a token; {log_in}"
    if status == 403:
        return f"the token does not allow it ({message}); use a token that does"
    if status == 429:
        seconds = error.response.headers.get("Retry-After")
        return f"the Hub limits the rate of requests; try again {f'in {seconds} s' if seconds else 'later'}"
    if status >= 500:
        return f"the Hub fails (status {status}); try again later"
    return f"the Hub refuses the request (status {status}: {message})"
