"""Loading the model to record, and its tokenizer: from one folder, safetensors only, and no code that comes along."""

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
from moe_beyond.fields import brief, printable
from moe_beyond.files import read_json
from moe_beyond.pretrained import CONFIG_FILE, WEIGHTS_FILE, shipped_folder, shipped_folders

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Patterns of a model's files other than weights: configurations, tokenizers, chat templates. No code, no pickle."""
SHOWN_KEYS = 3
"""Names of weights that a message lists."""
CODE = "auto_map"
"""The field of a configuration that names code of the model's own."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, before its weights are loaded.

    Attributes:
        name: Name that the user gave.
        folder: Folder of its files; for a model on the Hub, the snapshot of one commit in the Hub's cache.
        repository: On the Hub, and at which revision; None for a folder.
        revision: Revision that the user named; None for none.
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
        """Whether it comes with code of its own, which is not run."""
        return bool(getattr(self.config, CODE, None))

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
            load_in: ``"8bit"`` or ``"4bit"``, which bitsandbytes does; not tested.
            offload_folder: Folder for weights that a device map sends to disk.

        Raises:
            UserError: It cannot be loaded, or its files lack a weight or hold one of another shape.
        """
        from transformers import AutoModelForCausalLM

        more: dict[str, Any] = {}
        if load_in is not None:
            from transformers import BitsAndBytesConfig

            width = {f"load_in_{load_in}": True}
            more["quantization_config"] = BitsAndBytesConfig(**width)  # type: ignore[no-untyped-call]
        spread = not isinstance(device, str) or device == "auto"
        if spread or load_in is not None:
            more |= {"device_map": device if spread else {"": device}, "offload_folder": offload_folder}
        self._fetch_weights()
        with _one_line(self.name), _without_reports():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **more,
            )  # fmt: skip
            model, report = loaded
            _check_loaded(self.name, report)
            return model if more else model.to(device)  # type: ignore[no-any-return]

    def _fetch_weights(self) -> None:
        """Download the weights, if it is on the Hub: the files that its index names, and no others.

        Raises:
            UserError: They cannot be downloaded.
        """
        if self.repository is None:
            if not any(self.folder.glob("*.safetensors")) and any(self.folder.glob("*.bin")):
                raise UserError(
                    f"--model {self.name}: has only pickled weights (.bin), which may run code and are not loaded; in "
                    "an environment that you trust, load it with transformers and write it with save_pretrained"
                )
            return
        files = {WEIGHTS_FILE}
        if (index := self.folder / INDEX_FILE).is_file():
            content = read_json(index)
            named = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(named, dict):
                raise UserError(f"{self.name}: its {INDEX_FILE} is damaged (no weight_map)")
            files = {str(file) for file in named.values()}
        if all((self.folder / file).is_file() for file in files):  # of a commit, files never change
            return
        commit = HubName(self.repository.repository, self.folder.name)
        snapshot(commit, "model", sorted(files), shown=f"--model {self.name}")
        for file in sorted(files):
            if not (self.folder / file).is_file():
                raise UserError(
                    f"{self.name}: has no {file}, on the Hub or in its local cache; only safetensors are read"
                )


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Find a model and load its configuration and its tokenizer.

    Args:
        name: A folder, the name of a model that ships with this package, or ``ORG/REPO`` on the Hub.
        revision: On the Hub: a branch, a tag or a commit, which all files are taken from; ``main`` by default.

    Raises:
        UserError: There is none of that name, or it cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, repository = _find(name, revision)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"--model {name}: has no {CONFIG_FILE}; name the folder of a transformers model")
    with _one_line(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except KeyError as error:  # of a file that is JSON and no tokenizer
            raise UserError(
                f"--model {name}: its tokenizer files lack {error}; give the tokenizer files of the model"
            ) from error
    if not tokenizer.get_vocab():
        raise UserError(f"--model {name}: its tokenizer knows no token; give the tokenizer files of the model")
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
        name: A folder, the name of a model that ships with this package, or ``ORG/REPO`` on the Hub.
        revision: Branch, tag or commit of a model on the Hub; default: ``main``.
        dtype: To compute in; ``"auto"`` as stored.
        device: Device, as `moe_beyond.collect.devices.placement` reads it; default: ``cpu``.
        load_in: ``"8bit"`` or ``"4bit"``, which bitsandbytes does; not tested.

    Returns:
        The model, its tokenizer, and the bits per parameter where they are not those of its dtype.

    Raises:
        UserError: It cannot be loaded.
    """
    checkpoint = open_checkpoint(name, revision)
    model = checkpoint.load(dtype=dtype, device=placement(device), load_in=load_in)
    return model, checkpoint.tokenizer, bits(load_in)


def bits(load_in: str | None) -> float | None:
    """Return the bits per parameter of ``"8bit"`` and ``"4bit"``."""
    return None if load_in is None else float(load_in.removesuffix("bit"))


def bundled_models() -> list[str]:
    """List the names of the models that ship with this package."""
    return sorted(name for name, folder in shipped_folders().items() if _is_model(folder / CONFIG_FILE))


def _is_model(config: Path) -> bool:
    content = read_json(config)
    return isinstance(content, dict) and "model_type" in content


def _find(name: str, revision: str | None) -> tuple[Path, HubName | None]:
    """Find a model's folder, in the Hub's cache if need be, without asking the Hub about what is a path.

    Raises:
        UserError: There is none.
    """
    path = Path(name).expanduser()
    if is_hub_name(name):
        hub_name = parse_hub_name(name)
        if revision is not None and "@" in name:
            raise UserError(f"--model {name}: names a revision, and so does --revision {revision}; give one")
        return _download(name, HubName(hub_name.repository, revision or hub_name.revision))
    if path.is_file():
        raise UserError(f"--model {name}: is a file; name its folder")
    if not path.is_dir() and name in (bundled := bundled_models()):
        path = shipped_folder(name)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"--revision {revision}: --model {name} is a folder, which has no revisions; leave it out")
        return path, None
    if "/" not in name and not looks_local(name):
        near = near_path(name)
        if near is not None and near.is_dir():
            raise UserError(f"--model {name}: there is no such folder; did you mean {near}?")
        raise UserError(f"--model: {unknown('model', name, bundled)}; give a folder, or a name on the Hub: ORG/REPO")
    if looks_local(name) or not REPOSITORY.fullmatch(name):
        raise UserError(f"--model {no_such_file(name, 'folder', hint='on the Hub, models are called ORG/REPO')}")
    return _download(name, HubName(name, revision or "main"))


def _download(name: str, repository: HubName) -> tuple[Path, HubName]:
    named = repository.revision == "main" or "@" in name
    shown = f"--model {name}" if named else f"--model {name} at --revision {repository.revision}"
    try:
        return snapshot(repository, "model", SMALL_FILES, shown=shown), repository
    except UserError as error:
        if (near := near_path(name)) is None:
            raise
        raise UserError(f"{error}; or did you mean the folder {near}?") from error


def _check_loaded(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a model with random weights: transformers draws each that the files lack, or hold in another shape.

    Args:
        name: Name that the user gave.
        report: Loading information of `from_pretrained`; tied weights are not among its missing keys.

    Raises:
        UserError: A weight was drawn.
    """
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"--model {name}: its files lack {_some(missing)}, which would be random; give the complete checkpoint of "
            "the model"
        )
    if wrong := sorted(report["mismatched_keys"]):
        keys = [f"{key} is {list(stored)}, not {list(needed)}" for key, stored, needed in wrong]
        raise UserError(
            f"--model {name}: its weights do not have the shapes of its {CONFIG_FILE} ({_some(keys)}); give the "
            "complete files of one model"
        )


def _some(names: Sequence[str]) -> str:
    """List the first names, and count the others."""
    more = f" and {len(names) - SHOWN_KEYS:,} more" if len(names) > SHOWN_KEYS else ""
    return printable(", ".join(names[:SHOWN_KEYS])) + more


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from logging what it met in the files; `_check_loaded` reports what matters."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what a library says of files that it cannot load into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of files that are damaged, libraries raise whatever they met; tokenizers a bare one
        if "trust_remote_code" in str(error):  # what it says where only code of the model's own would do
            raise UserError(
                f"--model {name}: comes with code of its own ({CODE}), which is never run; only architectures that "
                "transformers itself has are recorded"
            ) from error
        if "CONVERSION" in str(error):  # it refers to a report that is not shown
            raise UserError(
                f"--model {name}: its weights cannot be put together; one that they need is missing, or has another "
                "shape; give the complete checkpoint of the model"
            ) from error
        raise UserError(f"--model {name}: cannot be loaded ({brief(error)})") from error
