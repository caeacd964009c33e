"""``route_trace v1`` of BigMoeOnEdge: CSV with one row per top-k entry, and the stored bytes of every layer.

Lines that begin with ``#`` describe the model. Columns are found by name, because later releases append some. A prompt
is computed in batches: all rows of its first layer come first, then those of the next layer. Generated text is computed
token by token. llama.cpp computes the last layer of a prompt only for its last token, so the other tokens have padding
there.

A session may have several turns, which continue a conversation or begin a new one. Every turn becomes a sequence.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, Preset
from moe_beyond.safe_text import brief, printable, shown
from moe_beyond.traces.engine_log import EngineLog, Residency
from moe_beyond.traces.formats._engine_metrics import read_metrics
from moe_beyond.traces.formats._format import Format, Option
from moe_beyond.traces.formats._ids import check_layers, checked_ids
from moe_beyond.traces.formats._recording import Progress, Recording, import_recording
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import experts_dtype, padding_id
from moe_beyond.traces.trace import Trace

Ints = npt.NDArray[np.int64]

VERSION = "# route_trace v1"
WHOLE = ("turn", "phase", "step", "layer", "slot", "expert", "residency", "expert_bytes")
"""Columns of whole numbers; ``weight`` is a number, and ``dropped`` is optional."""
PROMPT, DECODE = 0, 1
LARGEST_WEIGHT = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Entries:
    """Entries of a file, in its order.

    Attributes:
        turns: Number of each entry's turn, ``(R,)`` int64.
        phases: `PROMPT` or `DECODE`, ``(R,)`` int64.
        batches: Number of each entry's batch, ``(R,)`` int64: a batch runs through the layers once.
        steps: Position of each entry's token in its conversation, ``(R,)`` int64.
        layers: Position of each entry's layer among the MoE layers, ``(R,)`` int64.
        experts: Expert ids in router order, ``(R, K)`` integer.
        weights: Gate weights in the same order, ``(R, K)`` float64; None if the engine knew none.
        residency: Values of `Residency`, ``(R, K)`` uint8.
        lines: Line of each entry's first row, ``(R,)`` int64.
    """

    turns: Ints
    phases: Ints
    batches: Ints
    steps: Ints
    layers: Ints
    experts: npt.NDArray[Any]
    weights: npt.NDArray[np.float64] | None
    residency: npt.NDArray[np.uint8]
    lines: Ints


def import_route_trace(
    source: str | Path,
    out: str | Path,
    preset: Preset | None = None,
    *,
    metrics: str | Path | None = None,
    tokenizer: str | None = None,
    val_blocks: str | None = None,
    quantization_bits: float | None = None,
    progress: Progress = lambda done, total: None,
) -> TraceSet:
    """Turn a route trace into a trace set, with the engine's own log.

    Args:
        source: Path of the route trace.
        out: Folder of the new trace set.
        preset: Model that routed, for its name and parameters; the engine may use fewer experts per token (default:
            None, the description in the file, whose parameters are unknown).
        metrics: Path of the metrics of the same run (default: None, none are kept).
        tokenizer: Refused, because a route trace has no token ids (default: None).
        val_blocks: ``SIZE:EVERY``, as in `import_recording` (default: None, one split).
        quantization_bits: Refused, because the file has the bytes of every layer (default: None).
        progress: Called with the number of read parts and their total.

    Returns:
        The finished trace set.

    Raises:
        UserError: The recording is damaged, or does not fit the model or the metrics. Nothing is left behind.
    """
    source = Path(source)
    if quantization_bits is not None:
        raise UserError(
            f"--quantization: {source} has the bytes of every layer (got {quantization_bits:g}); remove the option"
        )
    lines = _read_lines(source)
    stored, rows = _described(source, lines)
    geometry = stored if preset is None else _with_parameters(source, stored, preset.geometry)
    entries = _entries(source, lines, rows, geometry)

    def read(path: Path, of: Geometry, *, progress: Progress) -> Recording:
        return _recording(path, of, entries, None if metrics is None else Path(metrics))

    bits = (
        None
        if geometry.params_per_expert == 0
        else float(8 * geometry.mean_expert_bytes(0) / geometry.params_per_expert)
    )
    given = Preset(geometry) if preset is None else replace(preset, geometry=geometry)
    return import_recording(
        read, source, out, given,
        tokenizer=tokenizer, val_blocks=val_blocks, quantization_bits=bits, progress=progress,
    )  # fmt: skip


def _read_lines(source: Path) -> list[str]:
    """Return the lines of a file that is complete, without their ends."""
    try:
        text = source.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({brief(error)}); give the CSV of a route trace") from error
    first, newline, _ = text.partition("\n")
    if first.rstrip("\r") != VERSION:
        raise UserError(f"{source}: line 1: must be {VERSION!r} (got {shown(first)}); record it with this version")
    lines = text.splitlines()
    if not newline or not text.endswith("\n"):
        raise UserError(f"{source}: line {len(lines)}: is truncated (got {shown(lines[-1])}); record the run again")
    return lines


def _described(source: Path, lines: Sequence[str]) -> tuple[Geometry, int]:
    """Return the geometry that the first lines describe, and the index of the line with the column names."""
    header = next((index for index, line in enumerate(lines) if not line.startswith("#")), None)
    if header is None:
        raise UserError(f"{source}: has no rows; record at least one token")
    fields: dict[str, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for number, line in enumerate(lines[1:header], 2):
        layer = re.fullmatch(r"# layer=(\d{1,9}) expert_bytes=(\d{1,15}) dense_bytes=(\d{1,15})", line, re.ASCII)
        model = re.fullmatch(
            r"# model=(?P<model>.*) arch=(?P<arch>\S*) n_layer=(?P<n_layer>\d{1,9}) n_expert=(?P<n_expert>\d{1,9}) "
            r"n_expert_used=(?P<n_expert_used>\d{1,9})",
            line,
            re.ASCII,
        )
        if layer is not None and int(layer[1]) not in sizes:
            sizes[int(layer[1])] = int(layer[2]), int(layer[3])
        elif model is not None and not fields:
            fields = model.groupdict()
        else:
            raise UserError(f"{source}: line {number}: is not understood (got {shown(line)}); record the run again")
    if not fields:
        raise UserError(f"{source}: the line with the model is missing; record the run again")
    if sorted(sizes) != list(range(int(fields["n_layer"]))):
        raise UserError(
            f"{source}: must give the bytes of {fields['n_layer']} layers (got {len(sizes)}); record the run again"
        )
    moe = [layer for layer in sorted(sizes) if sizes[layer][0]]
    name = PurePath(fields["model"].replace("\\", "/")).name.removesuffix(".gguf")
    try:
        geometry = Geometry(
            model=printable(name),
            moe_layers=tuple(moe),
            num_experts=int(fields["n_expert"]),
            top_k=int(fields["n_expert_used"]),
            params_per_expert=0,
            other_params_per_layer=0,
            expert_bytes=tuple(sizes[layer][0] for layer in moe),
            other_bytes=tuple(sizes[layer][1] for layer in moe),
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return geometry, header


def _with_parameters(source: Path, stored: Geometry, known: Geometry) -> Geometry:
    """Return the described geometry with the name and the parameters of a known model."""
    check_layers(np.array(stored.moe_layers), known, source)
    if stored.num_experts != known.num_experts or stored.top_k > known.top_k:
        raise UserError(
            f"{source}: has {stored.num_experts} experts, top-{stored.top_k}, but {known.model} has "
            f"{known.num_experts}, top-{known.top_k}; give the model of the recording"
        )
    return replace(known, top_k=stored.top_k, expert_bytes=stored.expert_bytes, other_bytes=stored.other_bytes)


def _entries(source: Path, lines: Sequence[str], header: int, geometry: Geometry) -> Entries:
    """Read the rows, and combine the K rows of each entry."""
    columns = _columns(source, lines, header)
    first_line, top_k = header + 2, geometry.top_k

    def refuse(row: Any, reason: str) -> UserError:
        return UserError(f"{source}: line {first_line + row}: {reason}; record the run again")

    count = len(columns["slot"])
    if count == 0:
        raise UserError(f"{source}: has no rows; record at least one token")
    if len(wrong := np.flatnonzero(columns["slot"] != np.arange(count) % top_k)):
        row = wrong[0]
        raise refuse(row, f"slot must be {row % top_k}, because rows are in router order (got {columns['slot'][row]})")
    if count % top_k:
        raise refuse(count - 1, f"is the last row, but its entry has {count % top_k} of {top_k} rows")
    entry = {name: column.reshape(-1, top_k) for name, column in columns.items()}
    for name in ("turn", "phase", "step", "layer"):
        if len(wrong := np.flatnonzero(columns[name] != np.repeat(entry[name][:, 0], top_k))):
            row = wrong[0]
            raise refuse(row, f"{name} must be {entry[name][row // top_k, 0]} as in slot 0 (got {columns[name][row]})")
    if len(wrong := np.flatnonzero(columns["dropped"])):
        raise refuse(wrong[0], "its expert was dropped by the engine, so it was not computed")
    if len(wrong := np.flatnonzero((columns["residency"] < 0) | (columns["residency"] > max(Residency)))):
        raise refuse(wrong[0], f"residency must be 0, 1 or 2 (got {columns['residency'][wrong[0]]})")
    layers = np.searchsorted(geometry.moe_layers, columns["layer"][::top_k])
    layers = np.minimum(layers, geometry.num_layers - 1)
    if len(wrong := np.flatnonzero(np.array(geometry.moe_layers)[layers] != columns["layer"][::top_k])):
        raise refuse(wrong[0] * top_k, f"layer {columns['layer'][wrong[0] * top_k]} has no experts")
    size = np.array(geometry.expert_bytes)[np.repeat(layers, top_k)]
    if len(wrong := np.flatnonzero((columns["expert_bytes"] != 0) & (columns["expert_bytes"] != size))):
        row = wrong[0]
        raise refuse(row, f"expert_bytes must be 0 or {size[row]} (got {columns['expert_bytes'][row]})")
    weights = entry["weight"]
    if len(wrong := np.flatnonzero(np.abs(columns["weight"]) > LARGEST_WEIGHT)):
        row = wrong[0]
        raise refuse(
            row, f"weight must be at most {LARGEST_WEIGHT:g} in half precision (got {columns['weight'][row]:g})"
        )
    unknown = np.isnan(weights)
    if unknown.any() and not unknown.all():
        raise refuse(int(np.flatnonzero(unknown)[0]), "has no weight, but others do")
    falls = (layers[1:] < layers[:-1]) | (entry["phase"][1:, 0] != entry["phase"][:-1, 0])
    falls |= entry["turn"][1:, 0] != entry["turn"][:-1, 0]
    return Entries(
        turns=entry["turn"][:, 0],
        phases=entry["phase"][:, 0],
        batches=np.concatenate([[0], np.cumsum(falls)]),
        steps=entry["step"][:, 0],
        layers=layers,
        experts=checked_ids(entry["expert"], geometry, lambda row, *_: f"{source}: line {first_line + row * top_k}"),
        weights=None if unknown.all() else weights,
        residency=entry["residency"].astype(np.uint8),
        lines=first_line + top_k * np.arange(count // top_k),
    )


def _columns(source: Path, lines: Sequence[str], header: int) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of the rows by name; ``dropped`` is 0 if the file has no such column."""
    names = lines[header].split(",")
    for name in (*WHOLE, "weight"):
        if names.count(name) != 1:
            raise UserError(
                f"{source}: line {header + 1}: must name the column {name!r} once (got {names.count(name)}); "
                "record the run again"
            )
    types = {name: pa.int64() for name in (*WHOLE, "dropped")} | {"weight": pa.float64()}
    included = [name for name in types if name in names]
    commas = len(names) - 1
    for number, line in enumerate(lines[header + 1 :], header + 2):
        if line.count(",") != commas:
            raise UserError(
                f"{source}: line {number}: must have {len(names)} columns (got {line.count(',') + 1}); "
                "record the run again"
            )
    if len(lines) == header + 1:
        return {name: np.zeros(0, np.int64) for name in types}
    try:
        table = pa.csv.read_csv(
            io.BytesIO("\n".join(lines[header + 1 :]).encode()),
            read_options=pa.csv.ReadOptions(column_names=names, use_threads=False),
            convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=included, null_values=[]),
        )
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{source}: cannot be read as rows of numbers ({brief(error)}); record the run again"
        ) from error
    columns = {name: table[name].to_numpy() for name in included}
    return {"dropped": np.zeros(len(table), np.int64), **columns}


def _recording(source: Path, geometry: Geometry, entries: Entries, metrics: Path | None) -> Recording:
    """Return the turns of a file as sequences, each with the engine's log."""
    numbers, first = np.unique(entries.turns, return_index=True)
    if (np.diff(entries.turns) < 0).any():
        row = int(np.flatnonzero(np.diff(entries.turns) < 0)[0]) + 1
        raise UserError(
            f"{source}: line {entries.lines[row]}: rows are out of order: turn {entries.turns[row]} follows turn "
            f"{entries.turns[row - 1]}; record the run again"
        )
    traces, residencies, chunks = [], [], set()
    for number in numbers:
        trace, residency, sizes = _turn(source, geometry, entries, entries.turns == number)
        name = source.name.removesuffix(".csv").removesuffix(".route")
        traces.append(replace(trace, sequence_id=name if len(numbers) == 1 else f"{name}-{number}"))
        residencies.append(residency)
        chunks.update(sizes)
    logs = [EngineLog(trace.sequence_id, residency) for trace, residency in zip(traces, residencies, strict=True)]
    if metrics is not None:
        measured = read_metrics(metrics, [(trace.decode_start, len(trace) - trace.decode_start) for trace in traces])
        logs = [
            replace(log, metrics=values, summary=summary) for log, (values, summary) in zip(logs, measured, strict=True)
        ]
    notes = [f"route trace of BigMoeOnEdge, {source.resolve().name}"]
    if chunks:
        notes.append(f"prompts were read in batches of up to {max(chunks):,} tokens")
    if len(numbers) > 1:
        continued = int((entries.steps[first[1:]] > 0).sum())
        notes.append(
            f"{len(numbers)} turns, one sequence each; {continued} continue the conversation of the turn before"
        )
    starts, sizes = [trace.decode_start for trace in traces], [len(trace) for trace in traces]
    author = "dataset" if starts == sizes else "mixed" if any(starts) else "model"
    return Recording("; ".join(notes), sizes, traces, author, None, logs)


def _turn(
    source: Path, geometry: Geometry, entries: Entries, chosen: npt.NDArray[np.bool_]
) -> tuple[Trace, npt.NDArray[np.uint8], list[int]]:
    """Return a turn's trace, the residency of its entries, and the sizes of its prompt's batches if there are several.

    A prompt batch lacks entries of the last layer, except that of the prompt's last token.
    """
    rows = np.flatnonzero(chosen)
    phases, batches, steps, layers = (
        array[rows] for array in (entries.phases, entries.batches, entries.steps, entries.layers)
    )

    def refuse(row: Any, reason: str) -> UserError:
        return UserError(f"{source}: line {entries.lines[rows[row]]}: {reason}; record the run again")

    if len(wrong := np.flatnonzero((phases < PROMPT) | (phases > DECODE))):
        raise refuse(wrong[0], f"phase must be 0 or 1 (got {phases[wrong[0]]})")
    if len(wrong := np.flatnonzero(np.diff(phases) < 0)):
        raise refuse(wrong[0] + 1, "rows are out of order: the prompt follows generated tokens")
    begin, last = int(steps[0]), geometry.num_layers - 1
    shape = (int(steps.max()) - begin + 1, geometry.num_layers, geometry.top_k)
    if not 0 <= begin or shape[0] > len(rows):
        raise refuse(0, f"rows are out of order: steps {begin} to {steps.max()} have {len(rows)} entries")
    experts = np.full(shape, padding_id(experts_dtype(geometry)), experts_dtype(geometry))
    gates, residency = np.zeros(shape), np.zeros(shape, np.uint8)
    following, prompt_sizes = begin, []
    bounds = np.flatnonzero(np.diff(batches, prepend=-1))
    for start, stop in zip(bounds, [*bounds[1:], len(rows)], strict=True):
        size = int((layers[start:stop] == layers[start]).sum())
        tokens = in_last = following + np.arange(size)
        if phases[start] == PROMPT:
            prompt_sizes.append(size)
            if stop - start < size * geometry.num_layers:  # only the token that ends the prompt has a last layer
                in_last = tokens[size - int(stop == len(rows) or phases[stop] == DECODE) :]
        due_layers = np.concatenate([np.repeat(np.arange(last), size), np.full(len(in_last), last)])
        due_steps = np.concatenate([np.tile(tokens, last), in_last])
        count = min(len(due_steps), stop - start)
        differs = (due_layers[:count] != layers[start:][:count]) | (due_steps[:count] != steps[start:][:count])
        if differs.any() or count < len(due_steps):
            row = int(differs.argmax()) if differs.any() else count
            raise refuse(
                min(start + row, len(rows) - 1),
                f"rows are missing or out of order: token {due_steps[row]} of layer "
                f"{geometry.moe_layers[due_layers[row]]} is due",
            )
        if count < stop - start:
            raise refuse(start + count, "rows are out of order: the batch is complete without this row")
        following += size
    token = steps - begin
    experts[token, layers], residency[token, layers] = entries.experts[rows], entries.residency[rows]
    if entries.weights is not None:
        gates[token, layers] = entries.weights[rows]
    trace = Trace(
        sequence_id="",
        source=f"{source.parent.resolve().name}/{source.name}",
        token_ids=np.zeros(shape[0], np.int32),
        experts=experts,
        decode_start=sum(prompt_sizes),
        gate_weights=None if entries.weights is None else gates.astype(np.float16),
    )
    return trace, residency, prompt_sizes if len(prompt_sizes) > 1 else []


FORMAT = Format(
    summary="route_trace v1 of BigMoeOnEdge: a .csv of one run or session, with the bytes of every layer",
    reader=import_route_trace,
    fields=(
        "# lines: model, number of layers and experts, bytes of an expert and of the other weights of each layer",
        "turn, phase (0: prompt, 1: generated), step, layer, slot (router order), expert, weight, residency",
        "--model is optional: it adds the parameters, which the file lacks",
    ),
    example=(
        "# layer=0 expert_bytes=3059712 dense_bytes=11953152",
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
        "0,0,0,0,0,49,0.221297,0,3059712",
    ),
    options=(Option("metrics", str, "FILE", "metrics of the same run, a row per generated token (default: none)"),),
    describes_model=True,
)
