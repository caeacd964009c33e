"""What lies on the Hugging Face Hub, by names like ``hf:ORG/REPO@REVISION``.

Files of known names come down; whatever else a repository holds stays there.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_beyond.errors import UserError, nearest
from moe_beyond.fields import brief

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["model", "dataset"]
"""What the Hub calls a predictor's repository, and a trace set's."""

PREFIX = "hf:"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")

FILE_SUFFIXES = frozenset(
    ".txt .json .jsonl .ndjson .csv .tsv .parquet .safetensors .gguf .bin .pt .pth .ckpt .yaml .yml .zip .gz .zst .md "
    ".py .npz .npy".split()
)
"""Suffixes of files; a repository on the Hub is hardly ever called so."""


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub at a revision: a branch, a tag or a commit."""

    repository: str
    revision: str

    def __str__(self) -> str:
        """Write it as `parse_hub_name` reads it."""
        return f"{PREFIX}{self.repository}@{self.revision}"


def is_hub_name(name: str) -> bool:
    """Tell whether a name means the Hub; ``hf://...`` is a URL, which fsspec reads."""
    return name.startswith(PREFIX) and not name.startswith(f"{PREFIX}//")


def parse_hub_name(name: str) -> HubName:
    """Read ``hf:ORG/REPO`` or ``hf:ORG/REPO@REVISION``.

    Raises:
        UserError: It is neither.

    Example:
        >>> parse_hub_name("hf:org/repo@v1")
        HubName(repository='org/repo', revision='v1')
    """
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    if not is_hub_name(name) or not REPOSITORY.fullmatch(repository) or (at and not revision):
        raise UserError(f"{name}: write hf:ORG/REPO or hf:ORG/REPO@REVISION")
    return HubName(repository, revision or "main")


def download(name: HubName, kind: Kind, needed: Sequence[str], wanted: Sequence[str] = ()) -> Path:
    """Download files of a repository, or find them in the Hub's local cache.

    Args:
        name: The repository.
        kind: Kind of the repository.
        needed: Files that must be there.
        wanted: Patterns of further files; no others are downloaded.

    Returns:
        The folder, named as the commit; it is the Hub's cache, not to be written to.

    Raises:
        UserError: There is no such repository, or it lacks a needed file, or the Hub cannot be asked.
    """
    folder = snapshot(name, kind, [*needed, *wanted])
    for file in needed:
        if not (folder / file).is_file():
            raise UserError(f"{name}: has no {file}; is it a repository of this package?")
    return folder


def snapshot(name: HubName, kind: Kind, patterns: Sequence[str], *, shown: str | None = None) -> Path:
    """Download the files of a repository whose names match, or find them in the Hub's local cache.

    Args:
        name: The repository.
        kind: Kind of the repository.
        patterns: Shell patterns of file names.
        shown: Name in error messages, if not ``hf:ORG/REPO@REVISION``.

    Returns:
        The folder, named as the commit; it is the Hub's cache, not to be written to.

    Raises:
        UserError: There is no such repository, or the Hub cannot be reached.
    """
    with asking_hub(shown or str(name)):
        from huggingface_hub import snapshot_download

        unreachable = _unreachable(name, kind) if COMMIT.fullmatch(name.revision) else None
        try:
            found = snapshot_download(
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
        return Path(found)


def _unreachable(name: HubName, kind: Kind) -> Exception | None:
    """Return what keeps this machine from reaching the Hub, after one request; None if it answers.

    Of a branch or a tag the library asks once before it lists files. Of a commit it lists them right away, and tries
    that six times, within half a minute.
    """
    from httpx2 import ConnectError, TimeoutException
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().repo_info(name.repository, repo_type=kind, revision=name.revision)
    except (ConnectError, TimeoutException, OfflineModeIsEnabled) as error:
        return error
    except HfHubHTTPError:
        return None  # the listing of files says the same, and what is in the cache may serve
    return None


def looks_local(name: str) -> bool:
    """Tell whether a name means a path on this machine, so that no request to the Hub is needed.

    It does if it begins like a path (``/``, ``./``, ``../``, ``~``), has other than one ``/`` or a known suffix, or if
    what is before its last ``/`` is a folder here.

    Example:
        >>> [looks_local(name) for name in ("./org/model", "a/b/c", "prompts.csv", "org/model")]
        [True, True, True, False]
    """
    path = Path(name)
    if name.startswith((".", "~", "/", os.sep)) or name.count("/") > 1 or path.suffix.lower() in FILE_SUFFIXES:
        return True
    return len(path.parts) > 1 and path.parent.is_dir()


def no_such_file(name: str, what: str, *, hint: str = "") -> UserError:
    """Build the error for a path that is not there, naming the entry of its folder that is spelt most alike.

    Args:
        name: The path, as the user wrote it.
        what: The expected kind, such as ``"folder"``.
        hint: Advice where nothing is spelt alike; default: none.
    """
    if (near := near_path(name)) is not None:
        return UserError(f"{name}: there is no such {what}; did you mean {near}?")
    return UserError(f"{name}: there is no such {what}" + (f"; {hint}" if hint else ""))


def near_path(name: str) -> Path | None:
    """Return a path that exists and is spelt like one that does not, or None."""
    path = Path(name).expanduser()
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    try:
        near = nearest(missing.name, os.listdir(missing.parent))
    except OSError:
        return None
    meant = missing.parent / near / path.relative_to(missing) if near else None
    return meant if meant is not None and meant.exists() else None


@contextmanager
def asking_hub(name: str) -> Iterator[None]:
    """Turn what the Hub refuses, or what keeps it from answering, into one line; show progress on a terminal alone.

    Args:
        name: What is asked for, as the user wrote it.

    Raises:
        UserError: The Hub, or the way to it, fails what is done inside.
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
    except (*refused, ValueError, RuntimeError) as error:  # of the latter: bad names and cards, failed transfers
        raise UserError(f"{name}: {_reason(error)}") from error
    finally:
        if hides:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    """Say what is behind an error of the library: it wraps what the Hub answered."""
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, HfHubHTTPError):
            return _answer(behind)
        if isinstance(behind, OfflineModeIsEnabled):
            return "is not in the local cache, and HF_HUB_OFFLINE keeps from asking the Hub; unset it"
        if isinstance(behind, TransportError):
            return f"the Hub cannot be reached at {constants.ENDPOINT} ({brief(behind)}); try again"
        behind = behind.__cause__
    return brief(error)


def _answer(error: "HfHubHTTPError") -> str:
    """Say what the Hub answered, and what to do about it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status, said = error.response.status_code, brief(error.server_message or "no reason given")
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision; name a branch, a tag or a commit"
    if isinstance(error, GatedRepoError):
        return "is gated; ask for access on its page"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository of this kind, or it is private: then {log_in}"
    if status == 401:
        return f"the Hub does not accept the token; {log_in}" if get_token() else f"the Hub wants a token; {log_in}"
    if status == 403:
        return f"the token does not allow it ({said}); use one that may"
    if status == 429:
        seconds = error.response.headers.get("Retry-After")
        return f"the Hub has had too many requests; try again {f'in {seconds} s' if seconds else 'later'}"
    if status >= 500:
        return f"the Hub fails (status {status}); try again later"
    return f"the Hub refuses it (status {status}: {said})"
