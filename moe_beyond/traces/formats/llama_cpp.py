"""The CSV traces of ``llama-moe-trace``, of which there are two.

llama.cpp's own example (pull request 28544) writes ``layer,expert``, a row an expert. Forks that cache experts read and
write ``position,layer,expert,expert,...``, a row an entry, where the prompt's positions are below zero. Neither has a
header; layers count from 0, dense ones too. A prompt is computed in micro-batches (``--ubatch-size``), what is written
token by token: all rows of a micro-batch's first layer, then all of the next.

Of a prompt's tokens llama.cpp computes the last layer only where logits are wanted, which is after the last token: the
ones before have no entry there, and a micro-batch that does not end the prompt has none at all. They are left out,
since nothing says what they would have been routed to, and traces begin with the prompt's last token.
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
from moe_beyond.fields import brief
from moe_beyond.files import creating
from moe_beyond.geometry import Geometry
from moe_beyond.traces.formats._checks import check_no_padding
from moe_beyond.traces.formats._files import source_files
from moe_beyond.traces.formats._format import Format
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._missing import notes
from moe_beyond.traces.formats._recording import Progress, Recording, recording_reader
from moe_beyond.traces.formats._sidecars import TOKENS, all_or_none, author_of, beside, by_file, read_token_ids
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entries:
    """What a file holds, whichever its columns.

    Attributes:
        tokens: ``(R,)``, the token of each entry, numbered through the file.
        layers: ``(R,)``, its layer, as the model counts.
        ids: ``(R, K)``, its experts.
        rows: ``(R,)``, the row of the file where it begins.
        sequences: ``(T,)``, the sequence of each token.
        written: ``(T,)`` bool, whether the model wrote it.
    """

    tokens: Ints
    layers: Ints
    ids: Ints
    rows: Ints
    sequences: Ints
    written: npt.NDArray[np.bool_]


def read_llama_cpp(source: Path, geometry: Geometry, *, progress: Progress) -> Recording:
    """Read a ``.csv``, or a folder of them.

    A file may hold several sequences, one after the other, as merged profiles do. Token ids may lie next to a file of
    one: ``NAME.tokens.npy``. A file without rows is passed over and counted.

    Args:
        source: The recording.
        geometry: The model's shape.
        progress: Told of the files that were read.

    Raises:
        UserError: A row is no entry of the model's, or a token lacks a layer.
    """
    files = {path.stem: path for path in source_files(source, ".csv")}
    tokens = {name: beside(path, TOKENS) for name, path in files.items()}
    has_token_ids = all_or_none(tokens, source, "token ids")
    traces: list[Trace] = []
    token_ids: dict[str, npt.NDArray[np.int32]] = {}
    left_out = empty = 0
    for done, (name, path) in enumerate(files.items(), 1):
        if (entries := _entries(path, geometry)) is None:
            empty += 1
            continue
        found = _sequences(path, entries, geometry)
        if len(found) > 1 and has_token_ids:
            raise UserError(f"{path}: holds {len(found)} sequences; token ids can lie beside a file of one")
        for number, (first, experts, decode_start) in enumerate(found):
            length = first + len(experts)
            ids = read_token_ids(tokens[name], length, slice(first, length))
            sequence_id = name if len(found) == 1 else f"{name}-{number}"
            traces.append(Trace(sequence_id, f"{path.parent.resolve().name}/{path.name}", ids, experts, decode_start))
            token_ids[name] = ids
            left_out += first
        progress(done, len(files))
    if not traces:
        raise UserError(f"{source}: has no rows")
    lengths = [len(trace) for trace in traces]
    without = f"; {left_out:,} tokens of prompts left out, whose last layer was not computed" if left_out else ""
    return Recording(
        source=f"llama.cpp trace, {source.resolve().name}{without}{notes(0, empty)}",
        lengths=lengths,
        traces=traces,
        author=author_of([trace.decode_start for trace in traces], lengths),
        token_ids=by_file(tokens, token_ids),
    )


def _entries(path: Path, geometry: Geometry) -> Entries | None:
    """Read a file; None where it has no rows."""
    if (read := _numbers(path)) is None:
        return None
    numbers, first_row = read
    if numbers.shape[1] == 2:
        return _of_experts(path, numbers, first_row, geometry)
    if numbers.shape[1] == 2 + geometry.top_k:
        return _of_positions(path, numbers, first_row, geometry)
    raise UserError(
        f"{path}: has {numbers.shape[1]} columns; {geometry.model} routes to {geometry.top_k}, so that a trace has 2 "
        f"(layer,expert) or {2 + geometry.top_k} (position,layer,experts)"
    )


def _numbers(path: Path) -> tuple[Ints, int] | None:
    """Read a file's numbers ``(R, columns)``, and the row in which they begin: after a header, if there is one."""
    with path.open("rb") as file:
        lines = [file.readline().removeprefix(BOM_UTF8), file.readline()]
    header = re.match(rb"\s*[A-Za-z\"]", lines[0]) is not None
    if not (first := lines[int(header)]).strip():
        return None
    names = [f"f{i}" for i in range(first.count(b",") + 1)]
    try:
        table = pa.csv.read_csv(
            path,
            # Without threads, for only then its errors name the row.
            read_options=pa.csv.ReadOptions(column_names=names, skip_rows=int(header), use_threads=False),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64())),
        )
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read as rows of numbers ({brief(error)})") from error
    for column in table.columns:
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy())[0] + 1 + int(header)
            raise UserError(f"{path}: row {row}: a number is missing")
    return np.stack([column.to_numpy() for column in table.columns], axis=1), 1 + int(header)


def _of_experts(path: Path, numbers: Ints, first_row: int, geometry: Geometry) -> Entries:
    """Understand ``layer,expert`` rows: how many tokens a micro-batch has follows from how often it names a layer.

    Only what ends a batch has rows of the last layer; so what follows a micro-batch without them goes on with its
    prompt, however small it is. A prompt may have several batches: one of equal or smaller size that follows a full one
    goes on with its prompt, if the model writes later. Whatever else may be a second sequence is refused.
    """
    layers, experts = numbers.T
    top_k, count = geometry.top_k, geometry.num_layers
    starts = np.flatnonzero(np.concatenate([[True], layers[1:] < layers[:-1]]))
    tokens: list[int] = []
    sequences: list[int] = []
    written: list[bool] = []
    done = sequence = 0
    previous, batch, begin, ended = 0, 0, 0, True  # tokens of the batch before and of this one, where it begins
    piece, full = 0, True  # tokens of the batch's first micro-batch; whether the batch before ended with as many
    unsettled = 0, 0, 0  # where a batch goes on with a prompt of which nothing is written yet, and sizes of both
    for start, stop in pairwise([*starts, len(layers)]):
        where = f"{path}: row {start + first_row}"
        found, rows = np.unique(layers[start:stop], return_counts=True)
        ends = stop == len(layers) or tuple(found) != geometry.moe_layers[:-1]
        if ends:
            check_layers(found, geometry, where)
        size, last = int(rows[0]) // top_k, int(rows[-1]) // top_k if ends else 0
        if len(ragged := np.flatnonzero(rows != size * top_k)) and (
            not ends or ragged.tolist() != [count - 1] or rows[-1] != top_k
        ):
            raise UserError(
                f"{where}: in the batch that begins there layer {found[ragged[0]]} has {rows[ragged[0]]} experts, "
                f"layer {found[0]} has {rows[0]}; {geometry.model} routes to {top_k}"
            )
        sequence += int(ended and previous == 1 and (size > 1 or not ends))
        writes = ended and ends and previous > 0 and size == 1
        written += [writes] * size
        batch, begin, piece = (size, start, size) if ended else (batch + size, begin, piece)
        unsettled = (0, 0, 0) if writes else unsettled
        if ends and not writes and previous > 1:
            if previous < batch or not full:
                raise _unclear(path, begin + first_row, batch, previous)
            unsettled = begin + first_row, batch, previous
        sequences += [sequence] * size
        tokens += [*np.tile(np.arange(done, done + size), count - 1), *range(done + size - last, done + size)]
        done, ended = done + size, ends
        previous, full = (batch, size == piece) if ends else (previous, full)
    if unsettled[0]:
        raise _unclear(path, *unsettled)
    return Entries(
        tokens=np.array(tokens),
        layers=layers[::top_k],
        ids=experts.reshape(-1, top_k),
        rows=np.arange(first_row, first_row + len(layers), top_k),
        sequences=np.array(sequences),
        written=np.array(written),
    )


def _unclear(path: Path, row: int, batch: int, previous: int) -> UserError:
    return UserError(
        f"{path}: row {row}: a batch of {batch} tokens follows one of {previous} that ends a prompt; layer,expert rows "
        "do not say whether another sequence begins; give each sequence a file, or record positions"
    )


def _of_positions(path: Path, numbers: Ints, first_row: int, geometry: Geometry) -> Entries:
    """Understand ``position,layer,experts`` rows; a sequence ends where positions fall after writing, or come again.

    A sequence that lacks a position, and a prompt whose rows were sorted, are refused.
    """
    positions, layers = numbers[:, 0], numbers[:, 1]
    check_layers(np.unique(layers), geometry, path)
    same, later = positions[1:] == positions[:-1], positions[1:] > positions[:-1]
    onward = (layers[1:] > layers[:-1]) | ((layers[1:] == layers[:-1]) & later)
    reading = (positions[1:] < 0) & (positions[:-1] < 0)
    starts = np.flatnonzero(np.concatenate([[True], ~(onward & (same | reading))]))
    tokens: list[int] = []
    sequences: list[int] = []
    written: list[bool] = []
    known: dict[int, int] = {}  # of this sequence: position -> token
    batches: list[list[int]] = []  # of this sequence
    sequence = begin = 0

    def check(stop: int) -> None:
        rows = numbers[begin:stop]
        computed = set(rows[rows[:, 1] == geometry.moe_layers[-1], 0].tolist())
        _check_positions(path, batches, computed, begin + first_row)

    for start, stop in pairwise([*starts, len(positions)]):
        batch = positions[start:stop].tolist()
        if start and (0 <= positions[start - 1] > batch[0] or not known.keys().isdisjoint(batch)):
            check(start)
            sequence, known, batches, begin = sequence + 1, {}, [], start
        batches.append(list(dict.fromkeys(batch)))
        for position in batch:
            if position not in known:
                known[position] = len(sequences)
                sequences.append(sequence)
                written.append(position >= 0)
            tokens.append(known[position])
    check(len(numbers))
    return Entries(
        tokens=np.array(tokens),
        layers=layers,
        ids=numbers[:, 2:],
        rows=np.arange(first_row, first_row + len(layers)),
        sequences=np.array(sequences),
        written=np.array(written),
    )


def _check_positions(path: Path, batches: list[list[int]], computed: set[int], row: int) -> None:
    """Refuse a sequence that lacks a position, or whose prompt is not in the order in which it was computed.

    Some tools number a prompt from -n to -1. Others number its first batch from -n to -1, and each later one from there
    downwards. Of a batch, the last layer is computed for all tokens, for the last one, or for none. Of the prompt's
    last token it always is. Sorted rows look like batches of one token.

    Args:
        path: The file.
        batches: Positions of the tokens of each batch of the sequence, in the order of the file.
        computed: Positions that have rows of the last layer.
        row: Row where the sequence begins.

    Raises:
        UserError: A position is missing, or the rows are in another order.
    """
    where = f"{path}: row {row}"
    positions = [position for batch in batches for position in batch]
    known = set(positions)
    for position in range(min(0, *positions), max(-1, *positions) + 1):
        if position not in known:
            raise UserError(f"{where}: position {position} is missing from the sequence that begins there")
    prompt = [position for position in positions if position < 0]
    ends = [place for place, (one, other) in enumerate(pairwise([*prompt, 0]), 1) if other != one + 1 or not other]
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
            f"{where}: the prompt of the sequence that begins there is not in the order in which it was computed; "
            "keep the rows as llama-moe-trace writes them, and do not sort them"
        )


def _sequences(path: Path, entries: Entries, geometry: Geometry) -> list[tuple[int, npt.NDArray[Any], int]]:
    """Return each sequence: how many tokens are left out before it, its experts ``(T, L, K)``, and its decode_start."""
    ids = checked_ids(entries.ids, geometry, lambda entry: f"{path}: row {entries.rows[entry]}")
    places = np.full((len(entries.sequences), geometry.num_layers), -1)  # of each token's entries
    places[entries.tokens, np.searchsorted(geometry.moe_layers, entries.layers)] = np.arange(len(ids))
    lacking = places < 0
    wrong = lacking.copy()
    wrong[~entries.written, -1] = False
    if len(missing := np.argwhere(wrong)):
        token, layer = missing[0]
        row = entries.rows[np.flatnonzero(entries.tokens == token)[0]]
        raise UserError(f"{path}: row {row}: the token has no experts of layer {geometry.moe_layers[layer]}")
    found = []
    for first, stop in pairwise([*np.flatnonzero(np.diff(entries.sequences, prepend=-1)), len(places)]):
        left_out = int(np.flatnonzero(lacking[first:stop, -1])[-1]) + 1 if lacking[first:stop, -1].any() else 0
        if first + left_out == stop:
            raise UserError(f"{path}: no token of a sequence has experts of layer {geometry.moe_layers[-1]}")
        kept = slice(first + left_out, stop)
        found.append((left_out, ids[places[kept]], int((~entries.written[kept]).sum())))
    return found


def export_llama_cpp(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as one profile.

    Args:
        traces: The trace set.
        out: The file to make.
        split: One split, or all.

    Raises:
        UserError: There is no such split, or the file is there already.
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
    """Return a sequence's rows: ``(T * L, 2 + K)``."""
    positions = np.arange(len(trace)) - trace.decode_start
    position, layer = np.meshgrid(positions, geometry.moe_layers, indexing="ij")
    entries = np.concatenate([np.stack([position, layer], axis=-1), trace.experts], axis=-1)  # (T, L, 2 + K)
    read = entries[: trace.decode_start].swapaxes(0, 1)
    written = entries[trace.decode_start :]
    return np.concatenate([part.reshape(-1, 2 + geometry.top_k) for part in (read, written)])


FORMAT = Format(
    summary="llama.cpp's llama-moe-trace: a .csv, or a folder of them; begins at a prompt's last token",
    reader=recording_reader(read_llama_cpp),
    writer=export_llama_cpp,
    fields=(
        "layer,expert: a row per expert, K rows per token and layer, micro-batch by micro-batch; or",
        "position,layer,expert,...: a row per token and layer, K experts; a prompt's positions are negative",
        "layer counts all layers of the model from 0; a header line is optional; rows stay in the order as written",
        "NAME.tokens.npy next to NAME.csv: token ids of all tokens of one sequence, optional",
    ),
    example=("-1,1,44,13,5,60,2,31", "0,1,44,7,9,12,63,1", "1,1,50,13,9,6,2,40"),
)
