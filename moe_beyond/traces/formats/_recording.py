"""Trace sets made of recordings: tokenizer, splits and manifest are the same for all formats."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Preset
from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.engine_log import EngineLog
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.splits import held_out_numbers, parse_blocks, without_copies
from moe_beyond.traces.tokenizers import Vocabulary, load_vocabulary
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import TraceWriter, open_writer
from moe_beyond.version import __version__

Progress = Callable[[int, int], None]
"""Callback for progress: the amount done, and the total."""


@dataclass(frozen=True)
class Recording:
    """The sequences of a recording.

    Attributes:
        source: Description of the recording for the manifest.
        lengths: Tokens of each sequence.
        traces: The sequences in the same order; a generator if they do not fit into memory.
        author: Author of the text, as in `moe_beyond.traces.manifest.Manifest`.
        token_ids: File -> recorded token ids, which are checked before anything is written; None if the recording has
            none. All token ids of the traces are 0 then.
        engine_logs: Log of the engine for each sequence (default: none).
    """

    source: str
    lengths: Sequence[int]
    traces: Iterable[Trace]
    author: str
    token_ids: Mapping[str, npt.NDArray[np.integer[Any]]] | None
    engine_logs: Sequence[EngineLog] = ()


def recording_reader(read: Callable[..., Recording]) -> Callable[..., TraceSet]:
    """Return the reader of a `Format`: `import_recording` with a given function.

    Args:
        read: Reads a recording, given its path, the geometry, ``progress`` and the options of the format.
    """
    return partial(import_recording, read)


def import_recording(
    read: Callable[..., Recording],
    source: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    tokenizer: str | None = None,
    val_blocks: str | None = None,
    quantization_bits: float | None = 16.0,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> TraceSet:
    """Turn a recording into a trace set.

    Args:
        read: Reads a recording, given its path, the geometry, ``progress`` and ``options``.
        source: Path of the recording.
        out: Folder of the new trace set.
        preset: Model that routed; its geometry defines the layers and experts that the recording must have.
        tokenizer: Tokenizer of the token ids (default: that of the preset).
        val_blocks: ``SIZE:EVERY``: validation gets one in EVERY blocks of SIZE consecutive sequences, without exact
            copies of training sequences (default: one split, ``train``).
        quantization_bits: Bits per parameter with which the model ran; None if the geometry has only bytes.
        progress: Called with the number of read parts and their total.
        **options: Options of the format.

    Returns:
        The finished trace set.

    Raises:
        UserError: The recording does not fit the model or the tokenizer. Nothing is left behind.
    """
    blocks = None if val_blocks is None else parse_blocks(val_blocks)
    recording = read(Path(source), preset.geometry, progress=progress, **options)
    vocabulary = _vocabulary(recording, preset, tokenizer, source)
    manifest = Manifest(
        geometry=preset.geometry,
        tokenizer=NO_TOKEN_IDS if vocabulary is None else describe_tokenizer(vocabulary, preset),
        model_id=preset.geometry.model,
        quantization_bits=quantization_bits,
        author=recording.author,
        source=recording.source,
        tool_version=__version__,
    )
    if recording.token_ids is not None:
        check_token_ids(recording.token_ids, manifest.tokenizer)
    held_out = set() if blocks is None else held_out_numbers(dict(enumerate(recording.lengths)), *blocks)
    vocabulary_path = None if vocabulary is None else vocabulary.path
    with open_writer(out, manifest, vocabulary=vocabulary_path, engine_logs=recording.engine_logs) as writer:
        write_splits(writer, recording.traces, held_out, manifest=manifest, folder=Path(out).parent, source=str(source))
        if writer.tokens != (tokens := sum(recording.lengths)):
            raise UserError(f"{source}: {tokens} tokens were read but {writer.tokens} written; report this as a bug")
    return TraceSet(str(out))


def describe_tokenizer(vocabulary: Vocabulary, preset: Preset) -> Tokenizer:
    """Return a manifest's description of a tokenizer.

    Models can sample ids in rows that pad their embedding. The vocabulary size is therefore the number of the
    tokenizer's ids or of the embedding's rows, whichever is larger.

    Args:
        vocabulary: The tokenizer's vocabulary.
        preset: Model that routed.
    """
    tokenizer = vocabulary.describe()
    return replace(tokenizer, vocab_size=max(tokenizer.vocab_size, preset.vocab_size or 0))


def check_token_ids(token_ids: Mapping[str, npt.NDArray[np.integer[Any]]], tokenizer: Tokenizer) -> None:
    """Check that token ids are in a vocabulary.

    Args:
        token_ids: File -> token ids.
        tokenizer: Tokenizer of the ids.

    Raises:
        UserError: An id is too large.
    """
    for location, ids in token_ids.items():
        if len(outside := ids[ids >= tokenizer.vocab_size]):
            raise UserError(
                f"{location}: token id {outside[0]} is out of range 0..{tokenizer.vocab_size - 1} of tokenizer "
                f"{tokenizer.name}; give the model's tokenizer, or its folder as --model, whose config.json has the "
                "number of embedding rows"
            )


def _vocabulary(recording: Recording, preset: Preset, tokenizer: str | None, source: str | Path) -> Vocabulary | None:
    """Load the tokenizer of the token ids; None if there are none."""
    if recording.token_ids is not None:
        if (name := tokenizer or preset.tokenizer) is None:
            raise UserError(
                f"{source}: has token ids, but {preset.geometry.model} has no default tokenizer; "
                "give one with --tokenizer"
            )
        return load_vocabulary(name)
    if tokenizer is not None:
        raise UserError(
            f"--tokenizer: {source} has no token ids (got {tokenizer}); remove the option, or add NAME.tokens.npy"
        )
    return None


def write_splits(
    writer: TraceWriter,
    traces: Iterable[Trace],
    held_out: Collection[int],
    *,
    manifest: Manifest,
    folder: Path,
    source: str,
) -> None:
    """Write sequences in one pass, to training or validation.

    Copies can be found only after all sequences were read. Until then the sequences held out for validation wait in a
    temporary trace set, so a recording may be larger than memory.

    Args:
        writer: Writer of the trace set.
        traces: The sequences, numbered from 0 in this order.
        held_out: Numbers of the sequences chosen for validation.
        manifest: Manifest of the trace set, without shards.
        folder: Folder of the temporary trace set.
        source: Name of the recording, for error messages.

    Raises:
        UserError: A sequence does not fit the trace set, or all chosen sequences are copies.
    """

    def write(target: TraceWriter, trace: Trace, split: str) -> None:
        try:
            target.write(trace, split)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    if not held_out:
        for trace in traces:
            write(writer, trace, "train")
        return
    texts = {}
    with TemporaryDirectory(prefix=".chosen.", dir=folder) as temporary:
        waiting = Path(temporary) / "set"
        tokenizer = replace(manifest.tokenizer, sha256=None)  # its file is not copied here
        with open_writer(waiting, replace(manifest, tokenizer=tokenizer)) as chosen:
            for number, trace in enumerate(traces):
                texts[number] = text_digest(trace.token_ids if manifest.has_token_ids else trace.experts)
                write(chosen if number in held_out else writer, trace, "train")
        kept = without_copies(held_out, texts)
        for number, trace in zip(sorted(held_out), TraceSet(str(waiting)).traces(), strict=True):
            write(writer, trace, "validation" if number in kept else "train")
