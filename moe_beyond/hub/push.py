"""Uploading a folder to a repository of the Hugging Face Hub, in one commit: completely or not at all."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moe_beyond.download import PREFIX, REPOSITORY, HubName, Kind, download, hub_errors, is_hub_name, parse_hub_name
from moe_beyond.errors import UserError
from moe_beyond.files import read_json
from moe_beyond.hub.predictors import LIBRARY, PICTURE_FILE, predictor_files
from moe_beyond.hub.traces import trace_files
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.pretrained import CONFIG_FILE
from moe_beyond.run_folder import PREDICTOR_FOLDER
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from moe_beyond.version import __version__

REPLACED: dict[Kind, tuple[str, ...]] = {
    "model": (PICTURE_FILE,),
    "dataset": ("*.parquet", "*.safetensors", TOKENIZER_FILE),
}
"""Files of an earlier upload that a new one deletes unless it has them too."""


@dataclass(frozen=True)
class Upload:
    """The files of an upload.

    Attributes:
        repository: Repository on the Hub, ``ORG/REPO``.
        kind: ``"model"`` for a predictor, ``"dataset"`` for a trace set.
        files: Name in the repository -> local path, or content.
    """

    repository: str
    kind: Kind
    files: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Return the size of each file, in bytes."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class UploadResult:
    """A finished upload.

    Attributes:
        url: Page of the repository.
        commit: Hash of the commit.
    """

    url: str
    commit: str


def prepare_upload(folder: str | Path, repository: str, traces: str | None = None) -> Upload:
    """Check a predictor folder or a trace set and collect its files, without network access.

    Args:
        folder: Predictor folder, or folder of a trace set.
        repository: Repository on the Hub, ``ORG/REPO``.
        traces: Uploaded trace set that the predictor was fitted on, ``hf:ORG/REPO``; None if there is none.

    Raises:
        UserError: The folder is neither of the two or is damaged, or a name is not valid.
    """
    check_repository(repository)
    folder = Path(folder)
    is_predictor, is_traces = (folder / CONFIG_FILE).is_file(), (folder / MANIFEST_FILE).is_file()
    if is_predictor and is_traces:
        raise UserError(
            f"{folder}: has both {CONFIG_FILE} (a predictor) and {MANIFEST_FILE} (a trace set); push two folders"
        )
    if is_predictor:
        dataset = None if traces is None else _dataset(traces)
        return Upload(repository, "model", predictor_files(folder, repository, dataset))
    if traces is not None:
        raise UserError(f"--traces {traces}: is only for predictors; push the trace set without it")
    if is_traces:
        return Upload(repository, "dataset", trace_files(folder, repository))
    exported = folder / PREDICTOR_FOLDER
    hint = exported if (exported / CONFIG_FILE).is_file() else "a predictor folder or a trace set"
    raise UserError(f"{folder}: has neither {CONFIG_FILE} (a predictor) nor {MANIFEST_FILE} (a trace set); push {hint}")


def check_repository(repository: str) -> None:
    """Check the name of a repository.

    Raises:
        UserError: The name is not of the form ``ORG/REPO``.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository!r} is not the name of a repository; write ORG/REPO (name a branch by --revision)")
    with hub_errors(repository):
        validate_repo_id(repository)


def check_trained_on(folder: str | Path, traces: str) -> None:
    """Check that a predictor was fitted on an uploaded trace set.

    Args:
        folder: Folder with the predictor.
        traces: Uploaded trace set, ``hf:ORG/REPO``.

    Raises:
        UserError: The fingerprints differ, or the manifest cannot be downloaded.
    """
    path = download(parse_hub_name(traces), "dataset", (MANIFEST_FILE,)) / MANIFEST_FILE
    manifest = Manifest.from_json(read_json(path), source=f"{traces}: {MANIFEST_FILE}")
    trained_on = read_config(folder).get("training", {}).get("fingerprint")
    if trained_on != manifest.fingerprint:
        raise UserError(
            f"--traces {traces}: {folder} was fitted on other traces (got fingerprint {trained_on}); name those"
        )


def open_repository(repository: str, kind: Kind, *, private: bool = False) -> None:
    """Create a repository unless it exists, and check that the user can write to it.

    Args:
        repository: Repository on the Hub, ``ORG/REPO``.
        kind: ``"model"`` for a predictor, ``"dataset"`` for a trace set.
        private: Whether the repository must be private (default: false).

    Raises:
        UserError: The user has no token or no right to write, or a private repository is required and it is public.
    """
    name = f"{PREFIX}{repository}"
    with hub_errors(name):
        if not is_offline_mode() and get_token() is None:
            raise UserError(f"{name}: the Hub requires a token; log in with `hf auth login`, or set HF_TOKEN")
        api = _api()
        api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True)
        api.auth_check(repository, repo_type=kind, write=True)
        if private and not api.repo_info(repository, repo_type=kind).private:
            raise UserError(f"{name}: is already public; make it private in its settings, or push without --private")


def push_upload(upload: Upload, *, private: bool = False, revision: str | None = None) -> UploadResult:
    """Upload files in one commit; a failure before the commit leaves the repository unchanged.

    Args:
        upload: Files and repository.
        private: Whether the repository must be private (default: false).
        revision: Branch to commit to; a missing branch is created (default: ``main``).

    Returns:
        The new commit, or the last one if no file changed.

    Raises:
        UserError: The user has no right to write, or the Hub or the connection fails.
    """
    open_repository(upload.repository, upload.kind, private=private)
    api, repository, kind = _api(), upload.repository, upload.kind
    with hub_errors(str(HubName(repository, revision or "main"))):
        if revision is not None:
            api.create_branch(repository, repo_type=kind, branch=revision, exist_ok=True)
        existing = api.list_repo_files(repository, repo_type=kind, revision=revision)
        obsolete = [name for name in existing if name not in upload.files and _is_replaced(name, kind)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in upload.files.items()),
            *(CommitOperationDelete(name) for name in obsolete),
        ]
        message = f"Upload {'predictor' if kind == 'model' else 'trace set'} with moe-beyond {__version__}"
        commit = api.create_commit(repository, operations, commit_message=message, repo_type=kind, revision=revision)
    return UploadResult(str(commit.repo_url), commit.oid)


def _is_replaced(name: str, kind: Kind) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in REPLACED[kind])


def _dataset(traces: str) -> str:
    if not is_hub_name(traces):
        raise UserError(f"--traces {traces}: is not on the Hub; push the trace set, then write hf:ORG/REPO")
    return parse_hub_name(traces).repository


def _api() -> HfApi:
    return HfApi(library_name=LIBRARY, library_version=__version__)
