"""The CSV files of the MoE-Beyond release (arXiv 2508.17137): one file per prompt, one row per (layer, token) pair."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, Preset
from moe_beyond.safe_text import brief, shown
from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.formats._files import column_names, listed
from moe_beyond.traces.formats._format import WORKERS, Format
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._recording import describe_tokenizer
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.splits import held_out_numbers, parse_blocks, without_copies
from moe_beyond.traces.tokenizers import Vocabulary, load_vocabulary
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from moe_beyond.version import __version__
from moe_beyond.workers import map_in_order

COLUMNS = {"Layer ID": pa.int32(), "Token": pa.string(), "Activated Expert IDs": pa.string()}
# The traces of the release were recorded with 8-bit weights, according to its collection script.
RECORDED_BITS = 8.0


def import_moe_beyond_csv(
    source: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    tokenizer: str | None = None,
    val_blocks: str | None = None,
    quantization_bits: float = RECORDED_BITS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 1,
) -> TraceSet:
    """Turn a folder of ``prompt_N_*.csv`` files into a trace set.

    The model read each prompt in one teacher-forced forward pass, so ``decode_start`` is T and the author of the
    text is the data set.

    Args:
        source: Path of the folder.
        out: Folder of the new trace set.
        preset: Model that routed; its geometry defines the layers and experts that a file must have.
        tokenizer: Tokenizer of the token strings (default: that of the preset).
        val_blocks: ``SIZE:EVERY``: validation gets one in EVERY blocks of SIZE consecutive prompt numbers, without
            exact copies of training prompts (default: one split, ``train``).
        quantization_bits: Bits per parameter with which the model ran.
        progress: Called with the number of files read and their total.
        workers: Number of processes that read files (default: 1).

    Returns:
        The finished trace set.

    Raises:
        UserError: A file, row or token does not fit. Nothing is left behind.
    """
    source = Path(source)
    files = prompt_files(source)
    if (name := tokenizer or preset.tokenizer) is None:
        raise UserError(
            f"{source}: {preset.geometry.model} has no default tokenizer for its tokens; give one with --tokenizer"
        )
    blocks = None if val_blocks is None else parse_blocks(val_blocks)
    vocabulary = load_vocabulary(name)
    manifest = Manifest(
        geometry=preset.geometry,
        tokenizer=describe_tokenizer(vocabulary, preset),
        model_id=preset.geometry.model,
        quantization_bits=quantization_bits,
        author="dataset",
        source=f"MoE-Beyond release, {source.resolve().name}",
        tool_version=__version__,
    )
    with open_writer(out, manifest, vocabulary=vocabulary.path) as writer:
        read = {}
        prompts = map_in_order(_read_prompt, (preset.geometry, vocabulary), files.items(), min(workers, len(files)))
        for number, prompt in zip(files, prompts, strict=True):
            read[number] = prompt
            progress(len(read), len(files))
        traces = {number: trace for number, (trace, _) in read.items()}
        tokens = {number: len(trace) for number, trace in traces.items()}
        texts = {number: text_digest(trace.token_ids) for number, trace in traces.items()}
        held_out = set() if blocks is None else without_copies(held_out_numbers(tokens, *blocks), texts)
        for number, trace in traces.items():
            writer.write(trace, "validation" if number in held_out else "train")
        rows, entries = sum(rows for _, rows in read.values()), writer.tokens * preset.geometry.num_layers
        if rows != entries:
            raise UserError(f"{source}: {rows} entries were read but {entries} written; report this as a bug")
    return TraceSet(str(out))


def prompt_files(source: Path) -> dict[int, Path]:
    """Return number -> prompt file of a folder, in ascending order.

    Args:
        source: Path of the folder.

    Raises:
        UserError: There is no file, or a file has no number or the number of another.
    """
    if not source.is_dir():
        raise UserError(f"{source}: is not a folder; give one with prompt_N_*.csv files")
    files: dict[int, Path] = {}
    for path in source.glob("*.csv"):
        if (match := re.match(r"prompt_(\d+)\D", path.name, re.ASCII)) is None:
            raise UserError(f"{path}: the file name must start with prompt_<number>_; rename or remove it")
        if (number := int(match[1])) in files:
            raise UserError(f"{path}: prompt {number} is in {files[number].name} too; remove one")
        files[number] = path
    if not files:
        raise UserError(f"{source}: has no prompt_N_*.csv file; give a folder with one")
    return dict(sorted(files.items()))


def _read_prompt(model: tuple[Geometry, Vocabulary], file: tuple[int, Path]) -> tuple[Trace, int]:
    """Return the trace of a prompt, and the number of rows of its file."""
    (geometry, vocabulary), (number, path) = model, file
    table = read_csv(path)
    order, length, layers = layer_order(path, table, geometry)
    token_ids = _token_ids(path, table["Token"], vocabulary)[order].reshape(-1, length)
    if len(differ := np.argwhere(token_ids != token_ids[0])):
        layer, position = differ[0]
        raise UserError(
            f"{path}: token {position} differs between layers {layers[layer]} and {layers[0]}; record it again"
        )
    experts = column_ids(path, table["Activated Expert IDs"], geometry)[order]
    folder = path.parent.resolve().name  # "." has no name
    trace = Trace(
        sequence_id=f"{folder}-{number}",
        source=f"{folder}/{path.name}",
        token_ids=token_ids[0].copy(),
        experts=experts.reshape(geometry.num_layers, length, geometry.top_k).transpose(1, 0, 2),
        decode_start=length,
    )
    return trace, table.num_rows


def layer_order(path: Path, table: pa.Table, geometry: Geometry) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[Any]]:
    """Return the order of rows that is layer by layer, the number of tokens, and the layers of a file.

    Args:
        path: Path of the file, for error messages.
        table: Rows of the file.
        geometry: Shape of the model.

    Raises:
        UserError: The layers are not the model's, or have different numbers of tokens.
    """
    layers = table["Layer ID"].to_numpy()
    order = np.argsort(layers, kind="stable")
    distinct, counts = np.unique(layers, return_counts=True)
    check_layers(distinct, geometry, path)
    if len(ragged := np.flatnonzero(counts != counts[0])):
        layer = distinct[ragged[0]]
        raise UserError(
            f"{path}: layer {layer} has {counts[ragged[0]]} tokens, but layer {distinct[0]} has {counts[0]}; record it"
            " again"
        )
    return order, int(counts[0]), distinct


def read_csv(path: Path, *more: str) -> pa.Table:
    """Read the file of a prompt.

    Args:
        path: Path of the file.
        *more: Names of required string columns besides `COLUMNS`.

    Raises:
        UserError: The file is not CSV, lacks a column, or has an empty cell.
    """
    import pyarrow.compute as pc  # imported here, because help lists the formats

    columns = {**COLUMNS, **dict.fromkeys(more, pa.string())}
    try:
        table = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(column_types=columns, strings_can_be_null=False),
        )
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read as CSV ({brief(error)})") from error
    names = column_names(path, table.schema)
    for name in columns:
        if names.count(name) > 1:
            raise UserError(f"{path}: column {name!r} is doubled; remove one")
        if name not in names:
            raise UserError(f"{path}: column {name!r} is missing (got {listed(names)}); add it")
        if table[name].null_count:
            raise UserError(
                f"{path}: row {pc.index(pc.is_null(table[name]), True).as_py() + 2}: {name} is empty; fill it in"
            )
    if table.num_rows == 0:
        raise UserError(f"{path}: has no rows; remove it, or record the prompt again")
    return table


def _token_ids(path: Path, column: pa.ChunkedArray, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    tokens = column.combine_chunks().dictionary_encode()
    if isinstance(tokens, pa.ChunkedArray):
        tokens = tokens.combine_chunks()
    ids = []
    for index, token in enumerate(tokens.dictionary.to_pylist()):
        if token not in vocabulary.ids:
            row = int(np.flatnonzero(tokens.indices.to_numpy() == index)[0]) + 2
            raise UserError(
                f"{path}: row {row}: tokenizer {vocabulary.name!r} has no token {token!r}; give that of the model"
            )
        ids.append(vocabulary.ids[token])
    column_ids: npt.NDArray[np.int32] = np.array(ids, np.int32)[tokens.indices.to_numpy()]
    return column_ids


def column_ids(path: Path, column: pa.ChunkedArray, geometry: Geometry) -> npt.NDArray[Any]:
    """Parse strings such as ``"[8, 26, 56]"`` into ``(rows, K)`` ids.

    Args:
        path: Path of the file, for error messages.
        column: Strings, one per row.
        geometry: Shape of the model.

    Raises:
        UserError: A row does not have K distinct experts of the model.
    """
    import pyarrow.compute as pc  # imported here, because help lists the formats

    inside = pc.utf8_trim(column, "[] ")
    listed = pc.split_pattern(inside, ",").combine_chunks()
    lengths = np.where(pc.equal(inside, ""), 0, pc.list_value_length(listed).to_numpy(zero_copy_only=False))
    if len(ragged := np.flatnonzero(lengths != geometry.top_k)):
        row, top_k = ragged[0], geometry.top_k
        raise UserError(
            f"{path}: row {row + 2}: must have the {top_k} experts of {geometry.model} (got {lengths[row]})"
        )
    numbers = pc.utf8_trim_whitespace(listed.flatten())
    if len(
        wrong := np.flatnonzero(~pc.match_substring_regex(numbers, r"^-?[0-9]{1,9}$").to_numpy(zero_copy_only=False))
    ):
        row, number = wrong[0] // geometry.top_k, numbers[int(wrong[0])].as_py()
        raise UserError(f"{path}: row {row + 2}: an expert id must be a whole number (got {shown(number)})")
    ids = pc.cast(numbers, pa.int32()).to_numpy().reshape(-1, geometry.top_k)
    return checked_ids(ids, geometry, lambda row: f"{path}: row {row + 2}")


FORMAT = Format(
    summary="the CSV files of the MoE-Beyond release: a folder of prompt_N_*.csv, one file per prompt",
    reader=import_moe_beyond_csv,
    options=(WORKERS,),
    fields=(
        "Layer ID: index of the layer, counted over all layers of the model from 0; one row per token and MoE layer",
        "Token: string of the token in the tokenizer's vocabulary",
        "Activated Expert IDs: a list of K expert ids",
        "all layers have the same tokens in the same order; the default of --quantization is 8",
    ),
    example=(
        "Layer ID,Token,Activated Expert IDs",
        '1,Ġthe,"[44, 13, 5, 60, 2, 31]"',
        '1,Ġcat,"[7, 9, 12, 63, 1, 30]"',
    ),
)
