"""Publishing a folder in a repository of the Hugging Face Hub: one commit, which is there as a whole or not at all."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moe_beyond.download import PREFIX, REPOSITORY, HubName, Kind, download, hub_errors, is_hub_name, parse_hub_name
from moe_beyond.errors import UserError
from moe_beyond.evaluation.checkpoints import EXPORTED
from moe_beyond.files import read_json
from moe_beyond.hub.predictors import LIBRARY, PICTURE_FILE, predictor_files
from moe_beyond.hub.traces import trace_files
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.pretrained import CONFIG_FILE
from moe_beyond.traces.manifest import MANIFEST_FILE, VOCABULARY_FILE, Manifest
from moe_beyond.version import __version__

REPLACED: dict[Kind, tuple[str, ...]] = {
    "model": (PICTURE_FILE,),
    "dataset": ("*.parquet", "*.safetensors", VOCABULARY_FILE),
}
"""What an earlier push may have left in a repository and a new one need not have: it goes."""


@dataclass(frozen=True)
class Upload:
    """What is to be published.

    Attributes:
        repository: ``ORG/REPO``.
        kind: A predictor's repository, or a trace set's.
        files: By their names there: where they lie, or what they hold.
    """

    repository: str
    kind: Kind
    files: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class Published:
    """Where something was published: the repository's page, and the commit."""

    url: str
    commit: str


def prepare(folder: str | Path, repository: str, traces: str | None = None) -> Upload:
    """Gather what is published of a predictor folder or a trace set, and look whether it is whole; no network is used.

    Args:
        folder: The folder.
        repository: Where it goes: ``ORG/REPO``.
        traces: Of a predictor, the published trace set that it was fitted on: ``hf:ORG/REPO``.

    Raises:
        UserError: The folder is neither, or is damaged, or a name cannot be read.
    """
    check_repository(repository)
    folder = Path(folder)
    is_predictor, is_traces = (folder / CONFIG_FILE).is_file(), (folder / MANIFEST_FILE).is_file()
    if is_predictor and is_traces:
        raise UserError(
            f"{folder}: has {CONFIG_FILE} and {MANIFEST_FILE}; a predictor and traces go to two repositories"
        )
    if is_predictor:
        dataset = None if traces is None else _dataset(traces)
        return Upload(repository, "model", predictor_files(folder, repository, dataset))
    if traces is not None:
        raise UserError("--traces names what a predictor was fitted on; a trace set goes by itself")
    if is_traces:
        return Upload(repository, "dataset", trace_files(folder, repository))
    inside = f"; it is in {folder / EXPORTED}" if (folder / EXPORTED / CONFIG_FILE).is_file() else ""
    raise UserError(f"{folder}: has neither {CONFIG_FILE} (a predictor) nor {MANIFEST_FILE} (a trace set){inside}")


def check_repository(repository: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UserError: It is not ``ORG/REPO``.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository!r} is no repository; write ORG/REPO (a branch goes into --revision)")
    with hub_errors(repository):
        validate_repo_id(repository)


def check_trained_on(folder: str | Path, traces: str) -> None:
    """Refuse to say that a predictor was fitted on traces that it was not fitted on.

    Args:
        folder: The predictor's.
        traces: The published trace set: ``hf:ORG/REPO``.

    Raises:
        UserError: Its fingerprint is another, or it cannot be asked for.
    """
    path = download(parse_hub_name(traces), "dataset", (MANIFEST_FILE,)) / MANIFEST_FILE
    manifest = Manifest.from_json(read_json(path), source=f"{traces}: {MANIFEST_FILE}")
    trained_on = read_config(folder).get("training", {}).get("fingerprint")
    if trained_on != manifest.fingerprint:
        raise UserError(f"--traces {traces}: {folder} was fitted on other traces (fingerprint {trained_on})")


def open_repository(repository: str, kind: Kind, *, private: bool = False) -> None:
    """See to it that there is a repository, and that this user may write to it.

    Args:
        repository: ``ORG/REPO``; it is made if it is not there.
        kind: A predictor's, or a trace set's.
        private: Whether only those who may see it are to see it.

    Raises:
        UserError: The user may not, or is unknown, or the repository is public although ``private`` is asked for.
    """
    name = f"{PREFIX}{repository}"
    with hub_errors(name):
        if not is_offline_mode() and get_token() is None:
            raise UserError(f"{name}: the Hub requires a token; log in with `hf auth login`, or set HF_TOKEN")
        api = _api()
        api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True)
        api.auth_check(repository, repo_type=kind, write=True)
        if private and not api.repo_info(repository, repo_type=kind).private:
            raise UserError(f"{name}: is public already; make it private in its settings, or push without --private")


def push(upload: Upload, *, private: bool = False, revision: str | None = None) -> Published:
    """Publish, in one commit; whatever fails before that leaves the repository's files as they were.

    Args:
        upload: What and where.
        private: Whether a repository that is made is to be private.
        revision: Branch to commit to, made if it is not there; the main one by default.

    Returns:
        Where it is now. Where nothing has changed, that is the last commit.

    Raises:
        UserError: The user may not, or the Hub or the way to it fails.
    """
    open_repository(upload.repository, upload.kind, private=private)
    api, repository, kind = _api(), upload.repository, upload.kind
    with hub_errors(str(HubName(repository, revision or "main"))):
        if revision is not None:
            api.create_branch(repository, repo_type=kind, branch=revision, exist_ok=True)
        there = api.list_repo_files(repository, repo_type=kind, revision=revision)
        old = [name for name in there if name not in upload.files and _is_replaced(name, kind)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in upload.files.items()),
            *(CommitOperationDelete(name) for name in old),
        ]
        message = f"{'Predictor' if kind == 'model' else 'Trace set'}, by moe-beyond {__version__}"
        commit = api.create_commit(repository, operations, commit_message=message, repo_type=kind, revision=revision)
    return Published(str(commit.repo_url), commit.oid)


def _is_replaced(name: str, kind: Kind) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in REPLACED[kind])


def _dataset(traces: str) -> str:
    if not is_hub_name(traces):
        raise UserError(f"--traces {traces}: is not on the Hub; push it first, then write hf:ORG/REPO")
    return parse_hub_name(traces).repository


def _api() -> HfApi:
    return HfApi(library_name=LIBRARY, library_version=__version__)
