"""The ``tokenizer.json`` that a trace set stores for the recorded model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_beyond.collect.devices import embedding_rows
from moe_beyond.errors import UserError
from moe_beyond.traces.manifest import TOKENIZER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RecordedTokenizer:
    """A tokenizer in the form that a trace set stores.

    Attributes:
        content: Content of the ``tokenizer.json``.
        file: File that the tokenizer was loaded from, with the same content; None if no file agrees.
        vocab_size: Largest id that the model can read or generate, plus one; it includes tokens outside
            ``tokenizer.json`` and padded rows of the embedding.
    """

    content: bytes
    file: Path | None
    vocab_size: int

    @property
    def sha256(self) -> str:
        """Hash of the ``tokenizer.json``."""
        return hashlib.sha256(self.content).hexdigest()


def recorded_tokenizer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> RecordedTokenizer:
    """Describe the tokenizer of a recorded model; nothing is downloaded.

    The file that the tokenizer was loaded from is stored unchanged, so that all trace sets of a model have one hash.
    Without such a file, or with one of another revision, the tokenizer itself is serialised.

    Args:
        model: MoE model of transformers.
        tokenizer: Tokenizer of the model.

    Raises:
        UserError: The tokenizer cannot be serialised as a ``tokenizer.json``.
    """
    ids = tokenizer.get_vocab()
    size = max(max(ids.values(), default=-1) + 1, embedding_rows(model))
    for file in _files(model, tokenizer):
        content = file.read_bytes()
        if _agrees(content, ids):
            return RecordedTokenizer(content, file, size)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__}: has no {TOKENIZER_FILE} and cannot be serialised "
            "as one; give a tokenizer of the tokenizers library (AutoTokenizer loads it)"
        )
    return RecordedTokenizer(backend.to_str(pretty=True).encode(), None, size)


def _files(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[Path]:
    """Return the files that a tokenizer may have been loaded from, in a folder or in the Hub's cache."""
    name = tokenizer.name_or_path
    if not name:
        return []
    if Path(name).is_dir():
        return [file for file in [Path(name) / TOKENIZER_FILE] if file.is_file()]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    files = []
    for revision in (getattr(model.config, "_commit_hash", None), "main"):
        try:
            file = try_to_load_from_cache(name, TOKENIZER_FILE, revision=revision)
        except HFValidationError:  # the name is no repository
            return []
        if revision is not None and isinstance(file, str):
            files.append(Path(file))
    return files


def _agrees(content: bytes, ids: dict[str, int]) -> bool:
    """Return whether a ``tokenizer.json`` is readable and assigns the same ids."""
    import tokenizers

    try:
        stored = tokenizers.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception:  # the library raises bare Exception
        return False
    return stored.items() <= ids.items()
