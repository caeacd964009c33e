"""``routed_experts`` of vLLM and SGLang: one array of ``[tokens, MoE layers, top-k]`` expert ids per request.

vLLM stores int16 or the narrowest type for the model, and SGLang stores int32. Some versions have one row for every
layer of the model, and fill the rows of dense layers with one value. Tokens that were not computed are -1 in all
layers.
"""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.files import creating, replacing_folder
from moe_beyond.geometry import Geometry
from moe_beyond.model_config import MOST_LAYERS
from moe_beyond.traces.formats._arrays import StoredArray, find_arrays
from moe_beyond.traces.formats._checks import check_no_padding
from moe_beyond.traces.formats._format import Format
from moe_beyond.traces.formats._ids import checked_ids
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
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace


def read_vllm(source: Path, geometry: Geometry, *, progress: Progress) -> Recording:
    """Read a ``.npy`` of one request, a folder of them, or an ``.npz`` of several.

    A request ``NAME`` may have the sidecars ``NAME.tokens`` and ``NAME.decode_start``
    (`moe_beyond.traces.formats._sidecars`). Requests without tokens are omitted and counted.

    Args:
        source: Path of the recording.
        geometry: Shape of the model.
        progress: Called with the number of sequences read and their total.

    Raises:
        UserError: An array is not routing of the model, or a sidecar does not fit it.
    """
    arrays = find_arrays(source)
    stored = {name: array for name, array in arrays.items() if not name.endswith((TOKENS, DECODE_START))}
    for name, array in arrays.items():
        if name not in stored and (owner := name.rpartition(".")[0]) not in stored:
            raise UserError(
                f"{array.location}: is a sidecar of {owner!r}, which is missing; add it, or remove the sidecar"
            )
    if not stored:
        raise UserError(f"{source}: has no sequence; record at least one")
    for array in stored.values():
        _check_shape(array, geometry)
    single = source if source.suffix == ".npy" else None
    tokens, starts = (
        {name: arrays.get(name + ending) if single is None else find_sidecar(single, ending) for name in stored}
        for ending in (TOKENS, DECODE_START)
    )
    all_or_none(tokens, source, "token ids")
    has_starts = all_or_none(starts, source, "decode_start")
    spans = {name: _span(array, geometry) for name, array in stored.items()}
    recorded = {name: span for name, span in spans.items() if span.stop}
    if not recorded:
        raise UserError(f"{source}: none of its {len(spans)} requests has a recorded token; record at least one")
    lengths = {name: stored[name].shape[0] for name in stored}
    decode_starts = {name: read_decode_start(starts[name], lengths[name], span) for name, span in recorded.items()}
    token_ids = {name: read_token_ids(tokens[name], lengths[name], span) for name, span in recorded.items()}

    def traces() -> Iterator[Trace]:
        for done, (name, span) in enumerate(recorded.items(), 1):
            yield Trace(
                sequence_id=name,
                source=f"{source.resolve().name}: {name}",
                token_ids=token_ids[name],
                experts=_experts(stored[name], geometry, span),
                decode_start=decode_starts[name],
            )
            progress(done, len(recorded))

    kept = [span.stop - span.start for span in recorded.values()]
    omitted = sum(lengths.values()) - sum(kept)
    return Recording(
        source=f"routed experts of an engine, {source.resolve().name}{notes(omitted, len(spans) - len(recorded))}",
        lengths=kept,
        traces=traces(),
        author=author_of(list(decode_starts.values()), kept) if has_starts else "unknown",
        token_ids=by_file(tokens, token_ids),
    )


def _check_shape(stored: StoredArray, geometry: Geometry) -> None:
    layers, top_k = geometry.num_layers, geometry.top_k
    if stored.shape and stored.shape[0] == 0:
        return
    if len(stored.shape) == 3 and stored.shape[2] == top_k:
        if stored.shape[1] == layers or MOST_LAYERS > stored.shape[1] > geometry.moe_layers[-1]:
            return
    raise UserError(
        f"{stored.location}: must have shape (tokens, {layers}, {top_k}) for {geometry.model}'s "
        f"{geometry.describe_shape()} (got {stored.shape})"
    )


def _span(stored: StoredArray, geometry: Geometry) -> slice:
    """Return the range of the recorded tokens of a request."""
    if stored.shape[0] == 0:
        return slice(0, 0)
    ids = stored.read()
    if ids.shape[1] != geometry.num_layers:
        ids = ids[:, np.array(geometry.moe_layers)]
    return recorded_span(ids, geometry.moe_layers, geometry.num_experts, stored.location)


def _experts(stored: StoredArray, geometry: Geometry, span: slice) -> npt.NDArray[Any]:
    """Read the experts of the recorded tokens, ``(T, L, K)``, without the rows of dense layers."""
    ids, layers = stored.read()[span], np.array(geometry.moe_layers)
    if ids.shape[1] != len(layers):
        dense = np.delete(ids, layers, axis=1)
        if len(filled := np.flatnonzero((dense != dense.flat[0]).any(axis=(0, 2)))):
            layer = np.delete(np.arange(ids.shape[1]), layers)[filled[0]]
            raise UserError(
                f"{stored.location}: has experts of layer {layer}, which is not an MoE layer of {geometry.model}; "
                "give the model of the recording"
            )
        ids = ids[:, layers]
    return checked_ids(
        ids, geometry, lambda token, row: f"{stored.location}: token {token + span.start}, layer {layers[row]}"
    )


def export_vllm(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as arrays, in one ``.npz`` or in a folder of ``.npy`` files.

    The sidecars ``NAME.tokens``, if the set has token ids, and ``NAME.decode_start`` are written too, so that an import
    gives the same set.

    Args:
        traces: The trace set.
        out: Path of the new file if it ends with ``.npz``, otherwise of the new folder.
        split: Name of a split (default: all splits).

    Raises:
        UserError: The split does not exist, ``out`` exists, or a sequence id cannot be a file name.
    """
    traces.shards(split)
    if Path(out).suffix == ".npz":
        with creating(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, array in _arrays(traces, split, _cannot_be_a_key):
                member = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date, so the same set gives the same bytes
                member.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        return
    with replacing_folder(out) as folder:
        for name, array in _arrays(traces, split, _cannot_be_a_file):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _arrays(
    traces: TraceSet, split: str | None, cannot_be: Callable[[str], bool]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for trace in traces.traces(split):
        name = trace.sequence_id
        if cannot_be(name):
            raise UserError(
                f"{traces.folder}: sequence {name!r} cannot be the name of a file; export to an .npz, or rename it"
            )
        check_no_padding(trace, traces)
        yield name, trace.experts.astype(np.int16)
        if traces.manifest.has_token_ids:
            yield name + TOKENS, trace.token_ids
        yield name + DECODE_START, np.array(trace.decode_start)


def _cannot_be_a_key(name: str) -> bool:
    return not name or name.endswith((TOKENS, DECODE_START))


def _cannot_be_a_file(name: str) -> bool:
    return _cannot_be_a_key(name) or name.startswith(".") or bool({"/", "\\", "\0"} & set(name))


FORMAT = Format(
    summary="routed_experts of vLLM or SGLang: one .npy per request in a folder, or an .npz of them",
    reader=recording_reader(read_vllm),
    writer=export_vllm,
    fields=(
        "an array of whole numbers, (tokens, MoE layers, K): expert ids, tokens and layers in the model's order",
        "-1 in all layers: a token that was not computed, omitted at both ends of a request",
        *FIELDS,
    ),
    example=(
        "np.save('engine/q1.npy', output.routed_experts)          # int16 (57, 26, 6)",
        "np.save('engine/q1.tokens.npy', prompt_ids + output_ids) # 57 or 58 ids",
        "np.save('engine/q1.decode_start.npy', len(prompt_ids))",
    ),
)
