"""Loading the model to record and its tokenizer from one folder: only safetensors, and no code of the checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_beyond.collect.devices import placement
from moe_beyond.download import (
    REPOSITORY,
    HubName,
    is_hub_name,
    looks_local,
    near_path,
    no_such_file,
    parse_hub_name,
    snapshot,
)
from moe_beyond.errors import UserError, unknown
from moe_beyond.files import read_json
from moe_beyond.pretrained import CONFIG_FILE, WEIGHTS_FILE, shipped_folder, shipped_folders
from moe_beyond.safe_text import brief, printable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
EXPERTS_FILE = "experts.safetensors"
"""Experts of a model that `moe-beyond pack` has written."""
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Patterns of a model's files other than weights: configurations, tokenizers, chat templates. No code, no pickle."""
MAX_LISTED = 3
"""Number of weights that an error message lists."""
CODE_FIELD = "auto_map"
"""Configuration field that names Python code of the checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model whose weights are not loaded yet.

    Attributes:
        name: Name that the user gave.
        folder: Folder of the files; for a model on the Hub, the snapshot of one commit in the Hub's cache.
        repository: Repository and revision on the Hub; None for a folder.
        revision: Revision that the user gave, or None.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model.
    """

    name: str
    folder: Path
    repository: HubName | None
    revision: str | None
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def model_id(self) -> str:
        """Name of the repository on the Hub, or of the folder."""
        return str(self.folder) if self.repository is None else self.repository.repository

    @property
    def has_code(self) -> bool:
        """Whether the checkpoint includes Python code, which is never run."""
        return bool(getattr(self.config, CODE_FIELD, None))

    def load(
        self,
        *,
        dtype: str = "auto",
        device: str | dict[str, Any] = "cpu",
        load_in: str | None = None,
        offload_folder: Path | None = None,
    ) -> "PreTrainedModel":
        """Load the model.

        Args:
            dtype: Type to compute in; default: ``"auto"``, the type of the stored weights.
            device: One device, ``"auto"``, or a device map.
            load_in: ``"8bit"`` or ``"4bit"``, quantized by bitsandbytes; untested (default: None).
            offload_folder: Folder for weights that a device map places on disk (default: None).

        Raises:
            UserError: The model cannot be loaded, or a weight is missing or has the wrong shape.
        """
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {}
        if load_in is not None:
            from transformers import BitsAndBytesConfig

            width = {f"load_in_{load_in}": True}
            options["quantization_config"] = BitsAndBytesConfig(**width)  # type: ignore[no-untyped-call]
        spread = not isinstance(device, str) or device == "auto"
        if spread or load_in is not None:
            options |= {"device_map": device if spread else {"": device}, "offload_folder": offload_folder}
        self.fetch_weights()
        with one_line_errors(self.name), quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **options,
            )  # fmt: skip
            model, report = loaded
            check_loaded(self.name, report)
            return model if options else model.to(device)  # type: ignore[no-any-return]

    def fetch_weights(self) -> None:
        """Download the weight files that the index of a Hub model lists, and the experts of a packed one.

        Raises:
            UserError: A file cannot be downloaded.
        """
        if self.repository is None:
            if not any(self.folder.glob("*.safetensors")) and any(self.folder.glob("*.bin")):
                raise UserError(
                    f"model {self.name}: has only pickled weights (.bin), which may run code; convert them in an "
                    "isolated environment: load the model with transformers, then call save_pretrained"
                )
            return
        files = {WEIGHTS_FILE}
        if (index := self.folder / INDEX_FILE).is_file():
            content = read_json(index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict):
                raise UserError(f"{self.name}: {INDEX_FILE} has no weight_map; download the model again")
            files = {str(file) for file in weight_map.values()}
        if all((self.folder / file).is_file() for file in files):  # the files of a commit never change
            return
        commit, shown = HubName(self.repository.repository, self.folder.name), f"model {self.name}"
        # No index lists the experts of a packed model. They come first: when the weights are here, they are, too.
        snapshot(commit, "model", [EXPERTS_FILE], shown=shown)
        snapshot(commit, "model", sorted(files), shown=shown)
        for file in sorted(files):
            if not (self.folder / file).is_file():
                raise UserError(
                    f"{self.name}: has no {file} on the Hub or in its cache; give a model with safetensors weights"
                )


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Find a model, and load its configuration and tokenizer.

    Args:
        name: Folder, name of a model that ships with this package, or ``ORG/REPO`` on the Hub.
        revision: Branch, tag or commit on the Hub, from which all files are read (default: ``main``).

    Raises:
        UserError: There is no such model, or its files cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, repository = _find(name, revision)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"model {name}: has no {CONFIG_FILE}; give the folder of a transformers model")
    with one_line_errors(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except KeyError as error:  # a JSON file that is no tokenizer
            raise UserError(
                f"model {name}: its tokenizer files lack {error}; give the tokenizer files of the model"
            ) from error
    if not tokenizer.get_vocab():
        raise UserError(f"model {name}: its tokenizer has no tokens; give the tokenizer files of the model")
    if repository is not None and "@" in name:
        revision = repository.revision
    return Checkpoint(name, folder, repository, revision, config, tokenizer)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = "cpu",
    load_in: str | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", float | None]:
    """Load a causal language model and its tokenizer.

    Args:
        name: Folder, name of a model that ships with this package, or ``ORG/REPO`` on the Hub.
        revision: Branch, tag or commit of a model on the Hub (default: ``main``).
        dtype: Type to compute in (default: ``"auto"``, the type of the stored weights).
        device: Device, as `moe_beyond.collect.devices.placement` reads it (default: ``cpu``).
        load_in: ``"8bit"`` or ``"4bit"``, quantized by bitsandbytes; untested (default: None).

    Returns:
        The model, its tokenizer, and the bits per parameter if they differ from those of its dtype, otherwise None.

    Raises:
        UserError: The model cannot be loaded.
    """
    checkpoint = open_checkpoint(name, revision)
    model = checkpoint.load(dtype=dtype, device=placement(device), load_in=load_in)
    return model, checkpoint.tokenizer, bits(load_in)


def bits(load_in: str | None) -> float | None:
    """Return the bits per parameter of a quantized model.

    Args:
        load_in: ``"8bit"``, ``"4bit"`` or None.
    """
    return None if load_in is None else float(load_in.removesuffix("bit"))


def bundled_models() -> list[str]:
    """List the names of the models that ship with this package."""
    return sorted(name for name, folder in shipped_folders().items() if _is_model(folder / CONFIG_FILE))


def _is_model(config: Path) -> bool:
    content = read_json(config)
    return isinstance(content, dict) and "model_type" in content


def _find(name: str, revision: str | None) -> tuple[Path, HubName | None]:
    """Find a model's folder, possibly in the Hub's cache; the Hub is never queried for a path.

    Raises:
        UserError: There is no such model.
    """
    path = Path(name).expanduser()
    if is_hub_name(name):
        hub_name = parse_hub_name(name)
        if revision is not None and "@" in name:
            raise UserError(f"model {name}: has a revision, and revision {revision} is another; give one of them")
        return _download(name, HubName(hub_name.repository, revision or hub_name.revision))
    if path.is_file():
        raise UserError(f"model {name}: is a file; give its folder")
    if not path.is_dir() and name in (bundled := bundled_models()):
        path = shipped_folder(name)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision}: model {name} is a folder, which has no revisions; leave it out")
        return path, None
    if "/" not in name and not looks_local(name):
        near = near_path(name)
        if near is not None and near.is_dir():
            raise UserError(f"model {name}: there is no such folder; did you mean {near}?")
        raise UserError(f"{unknown('model', name, bundled)}; give a folder, or a name on the Hub: ORG/REPO")
    if looks_local(name) or not REPOSITORY.fullmatch(name):
        raise UserError(f"model {no_such_file(name, 'folder', hint='a model on the Hub is ORG/REPO')}")
    return _download(name, HubName(name, revision or "main"))


def _download(name: str, repository: HubName) -> tuple[Path, HubName]:
    complete = repository.revision == "main" or "@" in name
    shown = f"model {name}" if complete else f"model {name} at revision {repository.revision}"
    try:
        return snapshot(repository, "model", SMALL_FILES, shown=shown), repository
    except UserError as error:
        if (near := near_path(name)) is None:
            raise
        raise UserError(f"{error}; or did you mean the folder {near}?") from error


def check_loaded(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a model with random weights: transformers initialises weights that are missing or have the wrong shape.

    Args:
        name: Name that the user gave.
        report: Loading information of `from_pretrained`; its missing keys exclude tied weights.

    Raises:
        UserError: A weight was initialised at random.
    """
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model {name}: its files lack {_listed(missing)}, which would be random; give the complete checkpoint "
            "of the model"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        keys = [f"{key} is {list(stored)}, not {list(needed)}" for key, stored, needed in mismatched]
        raise UserError(
            f"model {name}: its weights do not have the shapes of its {CONFIG_FILE} ({_listed(keys)}); give the "
            "complete files of one model"
        )


def _listed(names: Sequence[str]) -> str:
    """List the first names, and count the others."""
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return printable(", ".join(names[:MAX_LISTED])) + more


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading report of transformers; `check_loaded` reports the relevant parts."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn a library's error about files that it cannot load into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # for damaged files libraries raise any exception, tokenizers a bare `Exception`
        if "trust_remote_code" in str(error):  # transformers' message for an architecture that it lacks
            raise UserError(
                f"model {name}: needs Python code of the checkpoint ({CODE_FIELD}), which is never run; give a model "
                "whose architecture transformers has"
            ) from error
        if "CONVERSION" in str(error):  # the message refers to a report that is not shown
            raise UserError(
                f"model {name}: its files lack a weight, or one has the wrong shape; give the complete checkpoint of "
                "the model"
            ) from error
        raise UserError(f"model {name}: cannot be loaded ({brief(error)})") from error
