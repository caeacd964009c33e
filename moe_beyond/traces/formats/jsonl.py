"""JSON lines with one entry each.

A line is ``{"layer_idx": 3, "token_idx": 7, "selected_ids": [4, 9], "gate_weights": [0.7, 0.3]}``. ``layer_idx`` counts
all layers of the model from 0. ``gate_weights`` is optional, other fields are ignored, and lines may have any order. A
file is one sequence, with token ids in the sidecar ``NAME.tokens.npy``.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.formats._arrays import StoredArray
from moe_beyond.traces.formats._files import source_files
from moe_beyond.traces.formats._format import WORKERS, Format
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._missing import notes, recorded_span
from moe_beyond.traces.formats._recording import Progress, Recording, recording_reader
from moe_beyond.traces.formats._sidecars import (
    DECODE_START,
    FIELDS,
    TOKENS,
    all_or_none,
    author_of,
    by_file,
    find_sidecar,
    read_decode_start,
    read_token_ids,
)
from moe_beyond.traces.trace import Trace
from moe_beyond.workers import map_in_order

LARGEST_INDEX = 2**31 - 1
LARGEST_WEIGHT = float(np.finfo(np.float16).max)


@dataclass
class Entries:
    """Entries of a file in its order: layer, token, expert ids, gate weights and line number of each."""

    layers: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    gate_weights: list[list[float]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


def read_jsonl(source: Path, geometry: Geometry, *, progress: Progress, workers: int = 1) -> Recording:
    """Read a ``.jsonl`` of one sequence, or a folder of them.

    Args:
        source: Path of the recording.
        geometry: Shape of the model.
        progress: Called with the number of files read and their total.
        workers: Number of processes that read files (default: 1).

    Raises:
        UserError: A line is not an entry of the model, or a token lacks a layer.
    """
    files = {path.stem: path for path in source_files(source, ".jsonl")}
    tokens, starts = (
        {name: find_sidecar(path, ending) for name, path in files.items()} for ending in (TOKENS, DECODE_START)
    )
    all_or_none(tokens, source, "token ids")
    has_starts = all_or_none(starts, source, "decode_start")
    traces = []
    omitted = 0
    inputs = [(path, tokens[name], starts[name]) for name, path in files.items()]
    read = map_in_order(_trace, geometry, inputs, min(workers, len(inputs)))
    for done, (trace, missing) in enumerate(read, 1):
        omitted += missing
        if trace is not None:
            traces.append(trace)
        progress(done, len(files))
    if not traces:
        raise UserError(f"{source}: has no {'recorded tokens' if omitted else 'lines'}; record at least one sequence")
    lengths = [len(trace) for trace in traces]
    return Recording(
        source=f"JSON lines, {source.resolve().name}{notes(omitted, len(files) - len(traces))}",
        lengths=lengths,
        traces=traces,
        author=author_of([trace.decode_start for trace in traces], lengths) if has_starts else "unknown",
        token_ids=by_file(tokens, {trace.sequence_id: trace.token_ids for trace in traces}),
    )


def _trace(geometry: Geometry, inputs: tuple[Path, StoredArray | None, StoredArray | None]) -> tuple[Trace | None, int]:
    """Return the trace of a file with its sidecars, None without a recorded token; and the number of omitted tokens."""
    path, tokens, start = inputs
    entries = _entries(path, geometry)
    if not entries.lines:
        return None, 0
    rows = _rows(path, entries, geometry)
    ids = np.array(entries.ids)
    span = recorded_span(ids[rows], geometry.moe_layers, geometry.num_experts, str(path))
    length, rows = len(rows), rows[span]
    if len(rows) == 0:
        return None, length

    def line(token: int, layer: int) -> str:
        return f"{path}: line {entries.lines[rows[token, layer]]}"

    return Trace(
        sequence_id=path.stem,
        source=f"{path.parent.resolve().name}/{path.name}",
        token_ids=read_token_ids(tokens, length, span),
        experts=checked_ids(ids[rows], geometry, line),
        decode_start=read_decode_start(start, length, span),
        gate_weights=np.array(entries.gate_weights, np.float16)[rows] if entries.gate_weights else None,
    ), length - len(rows)


def _entries(path: Path, geometry: Geometry) -> Entries:
    entries = Entries()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                _add(entries, line, number, f"{path}: line {number}", geometry)
    return entries


def _add(entries: Entries, line: bytes, number: int, location: str, geometry: Geometry) -> None:
    """Check the fields of a line, and add them."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{location}: is not a JSON object")
    for name in ("layer_idx", "token_idx", "selected_ids"):
        if name not in record:
            raise UserError(f"{location}: {name} is missing")
    layer, token, ids = record["layer_idx"], record["token_idx"], record["selected_ids"]
    weights = record.get("gate_weights") or []
    for name, index in (("layer_idx", layer), ("token_idx", token)):
        if type(index) is not int or not 0 <= index <= LARGEST_INDEX:
            raise UserError(f"{location}: {name} must be a whole number from 0 on (got {json.dumps(index)})")
    if not isinstance(ids, list) or any(type(expert) is not int for expert in ids):
        raise UserError(f"{location}: selected_ids must be a list of whole numbers")
    if len(ids) != geometry.top_k:
        raise UserError(
            f"{location}: selected_ids must have the {geometry.top_k} experts of {geometry.model} (got {len(ids)})"
        )
    if not isinstance(weights, list) or not all(
        type(weight) in (int, float) and abs(weight) <= LARGEST_WEIGHT for weight in weights
    ):
        raise UserError(f"{location}: gate_weights must be a list of numbers up to {LARGEST_WEIGHT:g}")
    if weights and len(weights) != len(ids):
        raise UserError(f"{location}: gate_weights must have one number per expert (got {len(weights)} for {len(ids)})")
    if bool(weights) != bool(entries.gate_weights) and entries.lines:
        raise UserError(f"{location}: gate_weights must be in all lines or in none; add or remove them")
    entries.layers.append(layer)
    entries.tokens.append(token)
    entries.ids.append(ids)
    entries.lines.append(number)
    if weights:
        entries.gate_weights.append(weights)


def _rows(path: Path, entries: Entries, geometry: Geometry) -> np.ndarray:
    """Return ``(T, L)``, the index of the entry of every token and layer."""
    layers, layer_of = np.unique(entries.layers, return_inverse=True)
    check_layers(layers, geometry, path)
    tokens, token_of = np.unique(entries.tokens, return_inverse=True)
    if len(tokens) != tokens[-1] - tokens[0] + 1:
        gap = tokens[np.flatnonzero(np.diff(tokens) > 1)[0]] + 1
        raise UserError(f"{path}: token {gap} has no line; record the sequence again")
    rows = np.full((len(tokens), len(layers)), -1)
    for entry, (token, layer) in enumerate(zip(token_of, layer_of, strict=True)):
        if rows[token, layer] >= 0:
            raise UserError(
                f"{path}: line {entries.lines[entry]}: token {tokens[token]} of layer {layers[layer]} is in line "
                f"{entries.lines[rows[token, layer]]} too; remove one"
            )
        rows[token, layer] = entry
    if len(missing := np.argwhere(rows < 0)):
        token, layer = missing[0]
        raise UserError(f"{path}: token {tokens[token]} has no line for layer {layers[layer]}")
    return rows


FORMAT = Format(
    summary="JSON lines, one per token and MoE layer, in any order: one .jsonl per sequence, or a folder of them",
    reader=recording_reader(read_jsonl),
    options=(WORKERS,),
    fields=(
        "layer_idx: index of the layer, counted over all layers of the model from 0",
        "token_idx: position of the token in the sequence, without gaps; the first may have any number",
        "selected_ids: the K expert ids, in the router's order; all -1 for a token that was not computed",
        "gate_weights: the K gate weights in the same order; optional, in all lines or in none",
        "other fields are ignored",
        *FIELDS,
    ),
    example=(
        '{"token_idx": 0, "layer_idx": 1, "selected_ids": [44, 13, 5, 60, 2, 31]}',
        '{"token_idx": 0, "layer_idx": 2, "selected_ids": [7, 9, 12, 63, 1, 30]}',
        '{"token_idx": 1, "layer_idx": 1, "selected_ids": [13, 9, 6, 2, 40, 44]}',
    ),
)
