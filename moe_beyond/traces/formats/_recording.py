"""What becomes of every recording that an importer has read: a trace set, with its tokenizer and its splits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Preset
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.splits import parse_blocks, validation_numbers
from moe_beyond.traces.splitting import write_splits
from moe_beyond.traces.tokenizers import Vocabulary, load_vocabulary
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from moe_beyond.version import __version__

Progress = Callable[[int, int], None]
"""Is called with how much is done, and of how much."""


@dataclass(frozen=True)
class Recording:
    """Sequences that were recorded.

    Attributes:
        source: What they are, for the manifest.
        lengths: Tokens of each.
        traces: They themselves, in the same order; a generator where they are too many to hold.
        author: Who wrote their text, as a manifest says it.
        token_ids: By file, the token ids that were recorded, to check before anything is written; None where none were,
            and all are 0.
    """

    source: str
    lengths: Sequence[int]
    traces: Iterable[Trace]
    author: str
    token_ids: Mapping[str, npt.NDArray[np.integer[Any]]] | None


def import_recording(
    read: Callable[..., Recording],
    source: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    tokenizer: str | None = None,
    val_blocks: str | None = None,
    quantization_bits: float = 16.0,
    progress: Progress = lambda done, total: None,
    **how: Any,
) -> TraceSet:
    """Turn a recording into a trace set.

    Without ``val_blocks`` there is one split, ``train``.

    Args:
        read: Reads recordings of the format: given ``source``, the geometry, ``progress`` and ``how``.
        source: The recording.
        out: The trace set to make.
        preset: The model that routed; its geometry says which layers and experts there must be.
        tokenizer: Tokenizer of the token ids; the preset's by default.
        val_blocks: ``SIZE:EVERY`` sends blocks of consecutive sequences to a ``validation`` split, but for exact copies
            of training sequences.
        quantization_bits: Bits per parameter that the model ran with.
        progress: Told of the reading.
        **how: Options of the format.

    Returns:
        The finished trace set.

    Raises:
        UserError: Something of the recording does not fit; nothing is left behind.
    """
    blocks = None if val_blocks is None else parse_blocks(val_blocks)
    recording = read(Path(source), preset.geometry, progress=progress, **how)
    vocabulary = _vocabulary(recording, preset, tokenizer, source)
    manifest = Manifest(
        geometry=preset.geometry,
        tokenizer=NO_TOKEN_IDS if vocabulary is None else described(vocabulary, preset),
        model_id=preset.geometry.model,
        quantization_bits=quantization_bits,
        author=recording.author,
        source=recording.source,
        tool_version=__version__,
    )
    if recording.token_ids is not None:
        check_token_ids(recording.token_ids, manifest.tokenizer)
    held_out = set() if blocks is None else validation_numbers(dict(enumerate(recording.lengths)), *blocks)
    with open_writer(out, manifest, vocabulary=None if vocabulary is None else vocabulary.path) as writer:
        write_splits(writer, recording.traces, held_out, manifest=manifest, folder=Path(out).parent, source=str(source))
        if writer.tokens != sum(recording.lengths):
            raise UserError(f"{source}: {sum(recording.lengths)} tokens were found but {writer.tokens} written")
    return TraceSet(str(out))


def described(vocabulary: Vocabulary, preset: Preset) -> Tokenizer:
    """Return what a manifest says about a tokenizer: as many ids as it has, or as the model's embedding has rows.

    Models sample ids in rows that pad their embedding, so that the larger of the two counts.
    """
    tokenizer = vocabulary.describe()
    return replace(tokenizer, vocab_size=max(tokenizer.vocab_size, preset.vocab_size or 0))


def check_token_ids(token_ids: Mapping[str, npt.NDArray[np.integer[Any]]], tokenizer: Tokenizer) -> None:
    """Check that token ids are of a vocabulary.

    Raises:
        UserError: One is not.
    """
    for where, ids in token_ids.items():
        if len(outside := ids[ids >= tokenizer.vocab_size]):
            raise UserError(
                f"{where}: token id {outside[0]} is out of range 0..{tokenizer.vocab_size - 1} of tokenizer "
                f"{tokenizer.name}; give the tokenizer of the model, or the folder of the model as --model, whose "
                "config.json says how many rows its embedding has"
            )


def _vocabulary(recording: Recording, preset: Preset, tokenizer: str | None, source: str | Path) -> Vocabulary | None:
    """Load the tokenizer of the token ids, if there are any."""
    if recording.token_ids is not None:
        if (name := tokenizer or preset.tokenizer) is None:
            raise UserError(f"{preset.geometry.model} names no tokenizer; give that of the token ids with --tokenizer")
        return load_vocabulary(name)
    if tokenizer is not None:
        raise UserError(f"--tokenizer {tokenizer}: {source} has no token ids; leave it out, or add NAME.tokens.npy")
    return None
