"""The router traces of FLAME-MoE (arXiv 2505.20225): one Parquet file per layer, with one row per token.

``actives/iter_N/layer_NN.parquet`` has the columns ``indices`` and ``scores``; layers count from one.
``samples/*.parquet`` next to ``actives`` has the ``token_id`` of the same rows. The files do not mark the ends of
sequences. Pre-training filled all sequences to one length, so rows are cut into consecutive sequences of that length.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import brief
from moe_beyond.traces.formats._files import column_names, listed, source_files
from moe_beyond.traces.formats._format import Format, Option
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._recording import Progress, Recording, recording_reader
from moe_beyond.traces.parquet import check_size, open_parquet
from moe_beyond.traces.trace import Trace

SEQUENCE_TOKENS = 2048
"""Tokens of FLAME-MoE's training sequences."""
ROWS_AT_ONCE = 65536
LARGEST_SCORE = float(np.finfo(np.float16).max)
INTEGERS, FLOATS = "int16 int32 int64 uint8 uint16 uint32".split(), "halffloat float double".split()


def read_flame_moe(
    source: Path, geometry: Geometry, *, sequence_tokens: int = SEQUENCE_TOKENS, progress: Progress
) -> Recording:
    """Read the layers of one checkpoint, ``actives/iter_N``.

    Args:
        source: Path of the folder.
        geometry: Shape of the model; its layers count from 0.
        sequence_tokens: Rows per sequence; the last sequence may have fewer.
        progress: Called with the number of sequences read and their total.

    Raises:
        UserError: A layer is missing, or a file has wrong columns or rows.
    """
    if sequence_tokens < 1:
        raise UserError(f"--sequence-tokens: must be at least 1 (got {sequence_tokens})")
    layers = _layer_files(source, geometry)
    tokens = {path: _rows(path) for path in layers}
    for path, rows in tokens.items():
        if rows != tokens[layers[0]]:
            raise UserError(f"{path}: must have as many rows as {layers[0].name}, {tokens[layers[0]]} (got {rows})")
    if (total := tokens[layers[0]]) == 0:
        raise UserError(f"{layers[0]}: has no rows; record at least one token")
    samples_folder = source.resolve().parent.parent / "samples"
    samples = source_files(samples_folder, ".parquet") if samples_folder.is_dir() else []
    if samples and (samples_total := sum(map(_rows, samples))) < total:
        raise UserError(f"{samples_folder}: must have a token id for each of the {total} rows (got {samples_total})")
    lengths = [min(sequence_tokens, total - start) for start in range(0, total, sequence_tokens)]
    return Recording(
        source=f"FLAME-MoE traces, {source.resolve().parent.parent.name} {source.resolve().name}",
        lengths=lengths,
        traces=_traces(source, layers, samples, lengths, geometry, progress),
        author="dataset",
        token_ids=_largest_ids(samples, total) if samples else None,
    )


def _layer_files(source: Path, geometry: Geometry) -> list[Path]:
    files = source_files(source, ".parquet")
    numbers = []
    for path in files:
        number = path.stem.removeprefix("layer_")
        if not (path.stem.startswith("layer_") and number.isdecimal()):
            raise UserError(f"{path}: must be named layer_<number>.parquet; rename or remove it")
        numbers.append(int(number) - 1)
    check_layers(np.array(numbers), geometry, f"{source} (counted from one in file names)")
    return files


def _opened(path: Path) -> pq.ParquetFile:
    try:
        file = open_parquet(path)
        check_size(file, path.stat().st_size, str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({brief(error)})") from error
    return file


def _rows(path: Path) -> int:
    with _opened(path) as file:
        rows: int = file.metadata.num_rows
    return rows


def _traces(
    source: Path, layers: list[Path], samples: list[Path], lengths: list[int], geometry: Geometry, progress: Progress
) -> Iterator[Trace]:
    ids = [_sequences(_lists(path, "indices", INTEGERS, geometry), lengths, path) for path in layers]
    scores = [_sequences(_lists(path, "scores", FLOATS, geometry), lengths, path) for path in layers]
    parts = (part for path in samples for part in _token_ids(path))
    token_ids = _sequences(parts, lengths, samples[-1]) if samples else None
    start = 0
    for number, length in enumerate(lengths):
        experts = [
            checked_ids(next(chunk), geometry, lambda row, path=path, start=start: f"{path}: row {start + row}")
            for path, chunk in zip(layers, ids, strict=True)
        ]
        yield Trace(
            sequence_id=f"{source.resolve().name}-{number}",
            source=f"rows {start}..{start + length - 1}",
            token_ids=np.zeros(length, np.int32) if token_ids is None else next(token_ids),
            experts=np.stack(experts, axis=1),
            decode_start=length,
            gate_weights=np.stack([next(chunk) for chunk in scores], axis=1).astype(np.float16),
        )
        start += length
        progress(number + 1, len(lengths))


def _largest_ids(samples: list[Path], rows: int) -> dict[str, npt.NDArray[Any]]:
    """Return file -> its largest token id, within the first ``rows`` rows of all files."""
    largest: dict[str, npt.NDArray[Any]] = {}
    for path in samples:
        for ids in _token_ids(path):
            if len(ids := ids[:rows]):
                largest[str(path)] = np.maximum(largest.get(str(path), ids[:1]), ids.max())
            rows -= len(ids)
    return largest


def _sequences(parts: Iterator[npt.NDArray[Any]], lengths: list[int], location: object) -> Iterator[npt.NDArray[Any]]:
    """Cut arrays of any size into consecutive sequences of given lengths."""
    rest: npt.NDArray[Any] | None = None
    for length in lengths:
        while rest is None or len(rest) < length:
            if (part := next(parts, None)) is None:
                raise UserError(f"{location}: is damaged (it has fewer rows than its footer counts)")
            rest = part if rest is None else np.concatenate([rest, part])
        yield rest[:length]
        rest = rest[length:]


def _lists(path: Path, name: str, types: list[str], geometry: Geometry) -> Iterator[npt.NDArray[Any]]:
    """Read a column of lists in parts of ``(rows, K)``."""
    import pyarrow.compute as pc  # imported here, because help lists the formats

    start = 0
    for column in _columns(path, name):
        listed = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        if not listed or str(column.type.value_type) not in types:
            raise UserError(f"{path}: column {name!r} must hold lists of {types[0]} (got {column.type})")
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if len(ragged := np.flatnonzero(lengths != geometry.top_k)):
            raise UserError(
                f"{path}: row {start + ragged[0]}: {name} must have the {geometry.top_k} experts of "
                f"{geometry.model} (got {lengths[ragged[0]]:g})"
            )
        values = column.flatten()
        if values.null_count:
            row = start + pc.index(pc.is_null(values), True).as_py() // geometry.top_k
            raise UserError(f"{path}: row {row}: {name} must not be null")
        rows = values.to_numpy(zero_copy_only=False).reshape(-1, geometry.top_k)
        if len(wrong := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
            raise UserError(f"{path}: row {start + wrong[0]}: {name} must be finite numbers")
        if rows.dtype.kind == "f" and len(large := np.argwhere(np.abs(rows) > LARGEST_SCORE)):
            row, rank = large[0]
            raise UserError(
                f"{path}: row {start + row}: {name} must be at most {LARGEST_SCORE:g}, the largest number "
                f"in half precision (got {rows[row, rank]:g})"
            )
        yield rows
        start += len(column)


def _token_ids(path: Path) -> Iterator[npt.NDArray[Any]]:
    for column in _columns(path, "token_id"):
        if str(column.type) not in INTEGERS or column.null_count:
            raise UserError(f"{path}: column 'token_id' must hold whole numbers, without nulls (got {column.type})")
        yield column.to_numpy(zero_copy_only=False)


def _columns(path: Path, name: str) -> Iterator[pa.Array]:
    """Read one column in parts."""
    with _opened(path) as file:
        if name not in (names := column_names(path, file.schema_arrow)):
            raise UserError(f"{path}: column {name!r} is missing (got {listed(names)}); add it")
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name]):
                yield batch.column(0)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({brief(error)})") from error


FORMAT = Format(
    summary="FLAME-MoE's router traces: the folder actives/iter_N of a checkpoint",
    reader=recording_reader(read_flame_moe),
    fields=(
        "layer_NN.parquet: one file per MoE layer, counted from one, with one row per token",
        "columns indices (lists of K expert ids) and scores (lists of K gate weights)",
        "samples/*.parquet next to actives: column token_id, one row per token; optional",
        "--sequence-tokens N: length of every sequence, because rows do not mark where a sequence ends",
    ),
    example=(
        "actives/iter_540/layer_02.parquet   indices: [44, 13, 5, 60, 2, 31]   scores: [0.31, 0.2, ...]",
        "actives/iter_540/layer_03.parquet   indices: [7, 9, 12, 63, 1, 30]    scores: [0.28, 0.22, ...]",
        "samples/000.parquet                 token_id: 1453",
    ),
    options=(Option("sequence_tokens", int, "N", f"tokens per sequence (default: {SEQUENCE_TOKENS})"),),
)
