"""The two CSV formats of ``llama-moe-trace``.

llama.cpp's own example (pull request 28544) writes ``layer,expert``, one row per expert. Forks with an expert cache
read and write ``position,layer,expert,expert,...``, one row per entry. Positions of the prompt are negative there.
Neither format has a header. Layers count from 0, dense layers included. A prompt is computed in micro-batches
(``--ubatch-size``), and generated text token by token. All rows of a micro-batch's first layer come first, then all
rows of the next layer.

llama.cpp computes the last layer only for tokens whose logits are needed. In a prompt this is only the last token, so
earlier tokens have no entry there. A micro-batch that does not end the prompt has no rows of the last layer. Tokens
without an entry are omitted because their routing is unknown, so traces begin with the prompt's last token.
"""

import re
from codecs import BOM_UTF8
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from moe_beyond.errors import UserError
from moe_beyond.files import creating
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import brief
from moe_beyond.traces.formats._checks import check_no_padding
from moe_beyond.traces.formats._files import source_files
from moe_beyond.traces.formats._format import WORKERS, Format
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._missing import notes
from moe_beyond.traces.formats._recording import Progress, Recording, recording_reader
from moe_beyond.traces.formats._sidecars import TOKENS, all_or_none, author_of, by_file, find_sidecar, read_token_ids
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.workers import map_in_order

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entries:
    """Entries of a file of either format.

    Attributes:
        tokens: ``(R,)``, token of each entry, numbered through the file.
        layers: ``(R,)``, layer of each entry, counted over all layers of the model.
        ids: ``(R, K)``, experts of each entry.
        rows: ``(R,)``, first row of each entry in the file.
        sequences: ``(T,)``, sequence of each token.
        generated: ``(T,)`` bool, whether the model generated the token.
    """

    tokens: Ints
    layers: Ints
    ids: Ints
    rows: Ints
    sequences: Ints
    generated: npt.NDArray[np.bool_]


def read_llama_cpp(source: Path, geometry: Geometry, *, progress: Progress, workers: int = 1) -> Recording:
    """Read a ``.csv``, or a folder of them.

    A file may hold several consecutive sequences, as merged profiles do. A file of one sequence may have the sidecar
    ``NAME.tokens.npy``. Files without rows are omitted and counted.

    Args:
        source: Path of the recording.
        geometry: Shape of the model.
        progress: Called with the number of files read and their total.
        workers: Number of processes that read files (default: 1).

    Raises:
        UserError: A row is not an entry of the model, or a token lacks a layer.
    """
    files = {path.stem: path for path in source_files(source, ".csv")}
    tokens = {name: find_sidecar(path, TOKENS) for name, path in files.items()}
    has_token_ids = all_or_none(tokens, source, "token ids")
    traces: list[Trace] = []
    token_ids: dict[str, npt.NDArray[np.int32]] = {}
    omitted = empty = 0
    read = map_in_order(_read_file, geometry, files.values(), min(workers, len(files)))
    for done, ((name, path), sequences) in enumerate(zip(files.items(), read, strict=True), 1):
        if sequences is None:
            empty += 1
            continue
        if len(sequences) > 1 and has_token_ids:
            raise UserError(
                f"{path}: has token ids for {len(sequences)} sequences; give each sequence a file, or remove the ids"
            )
        for number, (first, experts, decode_start) in enumerate(sequences):
            length = first + len(experts)
            ids = read_token_ids(tokens[name], length, slice(first, length))
            sequence_id = name if len(sequences) == 1 else f"{name}-{number}"
            traces.append(Trace(sequence_id, f"{path.parent.resolve().name}/{path.name}", ids, experts, decode_start))
            token_ids[name] = ids
            omitted += first
        progress(done, len(files))
    if not traces:
        raise UserError(f"{source}: has no rows; record at least one sequence")
    lengths = [len(trace) for trace in traces]
    note = f"; {omitted:,} prompt tokens omitted, whose last layer was not computed" if omitted else ""
    return Recording(
        source=f"llama.cpp trace, {source.resolve().name}{note}{notes(0, empty)}",
        lengths=lengths,
        traces=traces,
        author=author_of([trace.decode_start for trace in traces], lengths),
        token_ids=by_file(tokens, token_ids),
    )


def _read_file(geometry: Geometry, path: Path) -> list[tuple[int, npt.NDArray[Any], int]] | None:
    """Return the sequences of a file; None if it has no rows."""
    entries = _entries(path, geometry)
    return None if entries is None else _sequences(path, entries, geometry)


def _entries(path: Path, geometry: Geometry) -> Entries | None:
    """Read a file; None if it has no rows."""
    if (table := _numbers(path)) is None:
        return None
    numbers, first_row = table
    if numbers.shape[1] == 2:
        return _of_experts(path, numbers, first_row, geometry)
    if numbers.shape[1] == 2 + geometry.top_k:
        return _of_positions(path, numbers, first_row, geometry)
    raise UserError(
        f"{path}: must have 2 columns (layer,expert) or {2 + geometry.top_k} (position,layer,experts) for "
        f"{geometry.model} (got {numbers.shape[1]})"
    )


def _numbers(path: Path) -> tuple[Ints, int] | None:
    """Read the numbers of a file, ``(R, columns)``, and the row of the first number, after an optional header."""
    with path.open("rb") as file:
        lines = [file.readline().removeprefix(BOM_UTF8), file.readline()]
    header = re.match(rb"\s*[A-Za-z\"]", lines[0]) is not None
    if not (first := lines[int(header)]).strip():
        return None
    names = [f"f{i}" for i in range(first.count(b",") + 1)]
    try:
        table = pa.csv.read_csv(
            path,
            # Without threads, because only then errors contain the row.
            read_options=pa.csv.ReadOptions(column_names=names, skip_rows=int(header), use_threads=False),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64())),
        )
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read as rows of numbers ({brief(error)})") from error
    for column in table.columns:
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy())[0] + 1 + int(header)
            raise UserError(f"{path}: row {row}: a number is missing; add it")
    return np.stack([column.to_numpy() for column in table.columns], axis=1), 1 + int(header)


def _of_experts(path: Path, numbers: Ints, first_row: int, geometry: Geometry) -> Entries:
    """Parse ``layer,expert`` rows.

    The number of tokens of a micro-batch follows from the number of rows per layer. Only the micro-batch that ends a
    batch has rows of the last layer. A micro-batch that follows one without such rows therefore continues its prompt,
    whatever its size. A prompt may have several batches. A batch of equal or smaller size that follows a full batch
    continues its prompt if the model generates text later. Any other batch could begin a second sequence, and is
    refused.
    """
    layers, experts = numbers.T
    top_k, count = geometry.top_k, geometry.num_layers
    starts = np.flatnonzero(np.concatenate([[True], layers[1:] < layers[:-1]]))
    tokens: list[int] = []
    sequences: list[int] = []
    generated: list[bool] = []
    done = sequence = 0
    previous, batch, begin, ended = 0, 0, 0, True  # tokens of the previous batch and of this one, first row of this one
    first_size, full = 0, True  # tokens of the batch's first micro-batch; whether the previous batch ended with as many
    unsettled = 0, 0, 0  # first row of a batch that continues a prompt without generated text so far; sizes of both
    for start, stop in pairwise([*starts, len(layers)]):
        location = f"{path}: row {start + first_row}"
        distinct, rows = np.unique(layers[start:stop], return_counts=True)
        ends = stop == len(layers) or tuple(distinct) != geometry.moe_layers[:-1]
        if ends:
            check_layers(distinct, geometry, location)
        size, last = int(rows[0]) // top_k, int(rows[-1]) // top_k if ends else 0
        if len(ragged := np.flatnonzero(rows != size * top_k)) and (
            not ends or ragged.tolist() != [count - 1] or rows[-1] != top_k
        ):
            raise UserError(
                f"{location}: in the batch that begins there, layer {distinct[ragged[0]]} has "
                f"{rows[ragged[0]]} experts, but layer {distinct[0]} has {rows[0]}, and {geometry.model} has {top_k} "
                "per token; record it again"
            )
        sequence += int(ended and previous == 1 and (size > 1 or not ends))
        generates = ended and ends and previous > 0 and size == 1
        generated += [generates] * size
        batch, begin, first_size = (size, start, size) if ended else (batch + size, begin, first_size)
        unsettled = (0, 0, 0) if generates else unsettled
        if ends and not generates and previous > 1:
            if previous < batch or not full:
                raise _unclear(path, begin + first_row, batch, previous)
            unsettled = begin + first_row, batch, previous
        sequences += [sequence] * size
        tokens += [*np.tile(np.arange(done, done + size), count - 1), *range(done + size - last, done + size)]
        done, ended = done + size, ends
        previous, full = (batch, size == first_size) if ends else (previous, full)
    if unsettled[0]:
        raise _unclear(path, *unsettled)
    return Entries(
        tokens=np.array(tokens),
        layers=layers[::top_k],
        ids=experts.reshape(-1, top_k),
        rows=np.arange(first_row, first_row + len(layers), top_k),
        sequences=np.array(sequences),
        generated=np.array(generated),
    )


def _unclear(path: Path, row: int, batch: int, previous: int) -> UserError:
    return UserError(
        f"{path}: row {row}: a batch of {batch} tokens follows one of {previous} that ends a prompt, and layer,expert "
        "rows do not mark new sequences; give each sequence a file, or record positions"
    )


def _of_positions(path: Path, numbers: Ints, first_row: int, geometry: Geometry) -> Entries:
    """Parse ``position,layer,experts`` rows.

    A sequence ends when positions decrease after generated text, or occur again. A sequence that lacks a position is
    refused, and so is a prompt with sorted rows.
    """
    positions, layers = numbers[:, 0], numbers[:, 1]
    check_layers(np.unique(layers), geometry, path)
    same, later = positions[1:] == positions[:-1], positions[1:] > positions[:-1]
    onward = (layers[1:] > layers[:-1]) | ((layers[1:] == layers[:-1]) & later)
    reading = (positions[1:] < 0) & (positions[:-1] < 0)
    starts = np.flatnonzero(np.concatenate([[True], ~(onward & (same | reading))]))
    tokens: list[int] = []
    sequences: list[int] = []
    generated: list[bool] = []
    token_of: dict[int, int] = {}  # position -> token, in this sequence
    batches: list[list[int]] = []  # positions of each batch of this sequence
    sequence = begin = 0

    def check(stop: int) -> None:
        rows = numbers[begin:stop]
        computed = set(rows[rows[:, 1] == geometry.moe_layers[-1], 0].tolist())
        _check_positions(path, batches, computed, begin + first_row)

    for start, stop in pairwise([*starts, len(positions)]):
        batch = positions[start:stop].tolist()
        if start and (0 <= positions[start - 1] > batch[0] or not token_of.keys().isdisjoint(batch)):
            check(start)
            sequence, token_of, batches, begin = sequence + 1, {}, [], start
        batches.append(list(dict.fromkeys(batch)))
        for position in batch:
            if position not in token_of:
                token_of[position] = len(sequences)
                sequences.append(sequence)
                generated.append(position >= 0)
            tokens.append(token_of[position])
    check(len(numbers))
    return Entries(
        tokens=np.array(tokens),
        layers=layers,
        ids=numbers[:, 2:],
        rows=np.arange(first_row, first_row + len(layers)),
        sequences=np.array(sequences),
        generated=np.array(generated),
    )


def _check_positions(path: Path, batches: list[list[int]], computed: set[int], row: int) -> None:
    """Check that a sequence has all positions, and that its prompt is in the order of computation.

    Some tools number a prompt from -n to -1. Others number its first batch from -n to -1, and continue downwards in
    later batches. The last layer is computed for all tokens of a batch, for its last token, or for none. It is always
    computed for the prompt's last token. Sorted rows look like batches of one token.

    Args:
        path: Path of the file, for error messages.
        batches: Positions of the tokens of each batch of the sequence, in the order of the file.
        computed: Positions with rows of the last layer.
        row: First row of the sequence.

    Raises:
        UserError: A position is missing, or the rows are in another order.
    """
    location = f"{path}: row {row}"
    positions = [position for batch in batches for position in batch]
    present = set(positions)
    for position in range(min(0, *positions), max(-1, *positions) + 1):
        if position not in present:
            raise UserError(
                f"{location}: position {position} is missing from the sequence that begins there; record it again"
            )
    prompt = [position for position in positions if position < 0]
    ends = [
        end
        for end, (position, following) in enumerate(pairwise([*prompt, 0]), 1)
        if not following or following != position + 1
    ]
    in_order = not prompt or prompt[-1] in computed
    for begin, end in pairwise([0, *ends]):
        in_order &= prompt[end - 1] == -begin - 1
    reading = [batch for batch in batches if batch[0] < 0]
    for *others, last in ([position in computed for position in batch] for batch in reading):
        in_order &= len(set(others)) < 2 and (last or not any(others))
    if len(ends) == 1 and len(reading) == len(prompt):  # one ascending run, token by token
        in_order &= len(computed.intersection(prompt)) in (1, len(prompt))
    if not in_order:
        raise UserError(
            f"{location}: the prompt of the sequence that begins there is not in the order of computation; "
            "keep the rows in the order of llama-moe-trace, and do not sort them"
        )


def _sequences(path: Path, entries: Entries, geometry: Geometry) -> list[tuple[int, npt.NDArray[Any], int]]:
    """Return the number of tokens omitted before each sequence, its experts ``(T, L, K)`` and its decode_start."""
    ids = checked_ids(entries.ids, geometry, lambda entry: f"{path}: row {entries.rows[entry]}")
    places = np.full((len(entries.sequences), geometry.num_layers), -1)  # entry of each token and layer
    places[entries.tokens, np.searchsorted(geometry.moe_layers, entries.layers)] = np.arange(len(ids))
    lacking = places < 0
    wrong = lacking.copy()
    wrong[~entries.generated, -1] = False
    if len(missing := np.argwhere(wrong)):
        token, layer = missing[0]
        row = entries.rows[np.flatnonzero(entries.tokens == token)[0]]
        raise UserError(
            f"{path}: row {row}: the token has no experts of layer {geometry.moe_layers[layer]}; record it again"
        )
    sequences = []
    for first, stop in pairwise([*np.flatnonzero(np.diff(entries.sequences, prepend=-1)), len(places)]):
        omitted = int(np.flatnonzero(lacking[first:stop, -1])[-1]) + 1 if lacking[first:stop, -1].any() else 0
        if first + omitted == stop:
            raise UserError(
                f"{path}: no token of a sequence has experts of layer {geometry.moe_layers[-1]}; record it again"
            )
        kept = slice(first + omitted, stop)
        sequences.append((omitted, ids[places[kept]], int((~entries.generated[kept]).sum())))
    return sequences


def export_llama_cpp(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as one profile, with one sequence after the other as in merged profiles.

    Args:
        traces: The trace set.
        out: Path of the new file.
        split: Name of a split (default: all splits).

    Raises:
        UserError: The split does not exist, or the file exists.
    """
    geometry = traces.geometry
    traces.shards(split)
    names = [f"f{i}" for i in range(2 + geometry.top_k)]
    schema = pa.schema([(name, pa.int64()) for name in names])
    options = pa.csv.WriteOptions(include_header=False)
    with creating(out) as temporary, pa.csv.CSVWriter(temporary, schema, write_options=options) as writer:
        for trace in traces.traces(split):
            check_no_padding(trace, traces)
            writer.write_table(pa.table([*_profile_rows(trace, geometry).T], schema=schema))


def _profile_rows(trace: Trace, geometry: Geometry) -> np.ndarray:
    """Return the rows of a sequence, ``(T * L, 2 + K)``: the prompt layer by layer, then token by token."""
    positions = np.arange(len(trace)) - trace.decode_start
    position, layer = np.meshgrid(positions, geometry.moe_layers, indexing="ij")
    entries = np.concatenate([np.stack([position, layer], axis=-1), trace.experts], axis=-1)  # (T, L, 2 + K)
    prompt = entries[: trace.decode_start].swapaxes(0, 1)
    generated = entries[trace.decode_start :]
    return np.concatenate([part.reshape(-1, 2 + geometry.top_k) for part in (prompt, generated)])


FORMAT = Format(
    summary="llama.cpp's llama-moe-trace: a .csv, or a folder of them; traces begin at a prompt's last token",
    reader=recording_reader(read_llama_cpp),
    options=(WORKERS,),
    writer=export_llama_cpp,
    fields=(
        "layer,expert: one row per expert, K rows per token and layer, micro-batch by micro-batch; or",
        "position,layer,expert,...: one row per token and layer, K experts; positions of a prompt are negative",
        "layer counts all layers of the model from 0; a header line is optional; rows must not be sorted",
        "NAME.tokens.npy next to NAME.csv: token ids of all tokens of one sequence; optional",
    ),
    example=("-1,1,44,13,5,60,2,31", "0,1,44,7,9,12,63,1", "1,1,50,13,9,6,2,40"),
)
