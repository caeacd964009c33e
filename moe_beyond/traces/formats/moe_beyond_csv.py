"""The CSV files of the MoE-Beyond release (arXiv 2508.17137): one file a prompt, one row a (layer, token) pair."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from moe_beyond.errors import UserError
from moe_beyond.fields import brief
from moe_beyond.geometry import Geometry, Preset
from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.formats._files import column_names, listed
from moe_beyond.traces.formats._format import Format
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._recording import describe_tokenizer
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.splits import parse_blocks, validation_numbers, without_copies
from moe_beyond.traces.tokenizers import Vocabulary, load_vocabulary
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer
from moe_beyond.version import __version__

COLUMNS = {"Layer ID": pa.int32(), "Token": pa.string(), "Activated Expert IDs": pa.string()}
# The release's traces were recorded with 8-bit weights (its collection script loads the model so).
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
) -> TraceSet:
    """Turn a folder of ``prompt_N_*.csv`` files into a trace set.

    The prompts were read by the model in one teacher-forced forward each, so ``decode_start`` is T and the author of
    the text is the data set. Without ``val_blocks`` there is one split, ``train``.

    Args:
        source: The folder.
        out: The trace set to make.
        preset: The model that routed; its geometry says which layers and experts a file must have.
        tokenizer: Tokenizer of the token strings; the preset's by default.
        val_blocks: ``SIZE:EVERY`` sends blocks of consecutive prompt numbers to a ``validation`` split, but for exact
            copies of training prompts.
        quantization_bits: Bits per parameter that the model ran with.
        progress: Called with the files that were read, and how many there are.

    Returns:
        The finished trace set.

    Raises:
        UserError: A file, row or token does not fit; nothing is left behind.
    """
    source = Path(source)
    files = prompt_files(source)
    if (name := tokenizer or preset.tokenizer) is None:
        raise UserError(f"{preset.geometry.model} names no tokenizer; give one with --tokenizer")
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
        for number, path in files.items():
            read[number] = _read_prompt(path, number, preset.geometry, vocabulary)
            progress(len(read), len(files))
        traces = {number: trace for number, (trace, _) in read.items()}
        tokens = {number: len(trace) for number, trace in traces.items()}
        texts = {number: text_digest(trace.token_ids) for number, trace in traces.items()}
        held_out = set() if blocks is None else without_copies(validation_numbers(tokens, *blocks), texts)
        for number, trace in traces.items():
            writer.write(trace, "validation" if number in held_out else "train")
        rows, entries = sum(rows for _, rows in read.values()), writer.tokens * preset.geometry.num_layers
        if rows != entries:
            raise UserError(f"{source}: {rows} entries were read but {entries} written")
    return TraceSet(str(out))


def prompt_files(source: Path) -> dict[int, Path]:
    """Find a folder's prompt files, by number.

    Raises:
        UserError: There are none, or one has no number or another's.
    """
    if not source.is_dir():
        raise UserError(f"{source}: is not a folder of prompt_N_*.csv files")
    files: dict[int, Path] = {}
    for path in source.glob("*.csv"):
        if (match := re.match(r"prompt_(\d+)\D", path.name, re.ASCII)) is None:
            raise UserError(f"{path}: file name does not start with prompt_<number>_")
        if (number := int(match[1])) in files:
            raise UserError(f"{path}: prompt {number} is in {files[number].name} already")
        files[number] = path
    if not files:
        raise UserError(f"{source}: holds no prompt_N_*.csv file")
    return dict(sorted(files.items()))


def _read_prompt(path: Path, number: int, geometry: Geometry, vocabulary: Vocabulary) -> tuple[Trace, int]:
    """Return a prompt's trace, and how many rows its file has."""
    table = read_csv(path)
    order, length, found = layer_order(path, table, geometry)
    token_ids = _token_ids(path, table["Token"], vocabulary)[order].reshape(-1, length)
    if len(differ := np.argwhere(token_ids != token_ids[0])):
        layer, position = differ[0]
        raise UserError(f"{path}: token {position} of layer {found[layer]} is not that of layer {found[0]}")
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
    """Return the order that puts a file's rows layer by layer, its tokens, and its layers.

    Raises:
        UserError: Its layers are not the model's, or one has more tokens than another.
    """
    layers = table["Layer ID"].to_numpy()
    order = np.argsort(layers, kind="stable")
    found, counts = np.unique(layers, return_counts=True)
    check_layers(found, geometry, path)
    if len(ragged := np.flatnonzero(counts != counts[0])):
        layer = found[ragged[0]]
        raise UserError(
            f"{path}: layer {layer} has {counts[ragged[0]]} tokens, layer {found[0]} has {counts[0]}; a layer is ragged"
        )
    return order, int(counts[0]), found


def read_csv(path: Path, *more: str) -> pa.Table:
    """Read a prompt's file.

    Args:
        path: The file.
        *more: Columns that it must have besides `COLUMNS`, strings.

    Raises:
        UserError: It is no CSV file with these columns, or a cell is empty.
    """
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
            raise UserError(f"{path}: column {name!r} is there twice")
        if name not in names:
            raise UserError(f"{path}: column {name!r} is missing; found {listed(names)}")
        if table[name].null_count:
            raise UserError(f"{path}: row {pc.index(pc.is_null(table[name]), True).as_py() + 2}: {name} is empty")
    if table.num_rows == 0:
        raise UserError(f"{path}: has no rows")
    return table


def _token_ids(path: Path, column: pa.ChunkedArray, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    words = column.combine_chunks().dictionary_encode()
    if isinstance(words, pa.ChunkedArray):
        words = words.combine_chunks()
    ids = []
    for index, word in enumerate(words.dictionary.to_pylist()):
        if word not in vocabulary.ids:
            row = int(np.flatnonzero(words.indices.to_numpy() == index)[0]) + 2
            raise UserError(f"{path}: row {row}: token {word!r} is unknown to the tokenizer {vocabulary.name!r}")
        ids.append(vocabulary.ids[word])
    column_ids: npt.NDArray[np.int32] = np.array(ids, np.int32)[words.indices.to_numpy()]
    return column_ids


def column_ids(path: Path, column: pa.ChunkedArray, geometry: Geometry) -> npt.NDArray[Any]:
    """Parse ``"[8, 26, 56]"`` strings into ``(rows, K)`` ids.

    Raises:
        UserError: A row is not K distinct experts of the model.
    """
    inside = pc.utf8_trim(column, "[] ")
    listed = pc.split_pattern(inside, ",").combine_chunks()
    lengths = np.where(pc.equal(inside, ""), 0, pc.list_value_length(listed).to_numpy(zero_copy_only=False))
    if len(ragged := np.flatnonzero(lengths != geometry.top_k)):
        row, top_k = ragged[0], geometry.top_k
        raise UserError(f"{path}: row {row + 2}: {lengths[row]} expert ids, but {geometry.model} routes to {top_k}")
    words = pc.utf8_trim_whitespace(listed.flatten())
    if len(wrong := np.flatnonzero(~pc.match_substring_regex(words, r"^-?[0-9]{1,9}$").to_numpy(zero_copy_only=False))):
        row, word = wrong[0] // geometry.top_k, words[int(wrong[0])].as_py()
        raise UserError(f"{path}: row {row + 2}: expert id {word!r} is not a whole number")
    ids = pc.cast(words, pa.int32()).to_numpy().reshape(-1, geometry.top_k)
    return checked_ids(ids, geometry, lambda row: f"{path}: row {row + 2}")


FORMAT = Format(
    summary="the CSV files of the MoE-Beyond release: a folder of prompt_N_*.csv, a file per prompt",
    reader=import_moe_beyond_csv,
    fields=(
        "Layer ID: the layer, counted over all layers of the model from 0; a row per token and MoE layer",
        "Token: the token's string in the tokenizer's vocabulary",
        "Activated Expert IDs: a list of K expert ids",
        "tokens come in order, and all layers have the same; quantisation is 8 bits unless --quantization says another",
    ),
    example=(
        "Layer ID,Token,Activated Expert IDs",
        '1,Ġthe,"[44, 13, 5, 60, 2, 31]"',
        '1,Ġcat,"[7, 9, 12, 63, 1, 30]"',
    ),
)
