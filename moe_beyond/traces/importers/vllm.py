"""``routed_experts`` as vLLM and SGLang return it: an array of ``[tokens, MoE layers, top-k]`` expert ids a sequence.

vLLM stores int16, or what is narrowest for the model; SGLang int32. Some versions have a row for every layer of the
model, filled with one value where the layer is dense.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.importers.arrays import StoredArray, find_arrays
from moe_beyond.traces.importers.companions import (
    DECODE_START,
    TOKENS,
    all_or_none,
    author_of,
    beside,
    read_decode_start,
    read_token_ids,
)
from moe_beyond.traces.importers.experts import checked_ids
from moe_beyond.traces.importers.recording import Progress, Recording
from moe_beyond.traces.trace import Trace


def read_vllm(source: Path, geometry: Geometry, *, progress: Progress) -> Recording:
    """Read a ``.npy`` of one sequence, a folder of them, or an ``.npz`` of several.

    Beside a sequence ``NAME`` may lie its ``NAME.tokens`` and its ``NAME.decode_start``
    (`moe_beyond.traces.importers.companions`).

    Args:
        source: The recording.
        geometry: The model's shape.
        progress: Told of the sequences that were read.

    Raises:
        UserError: An array is none of the model's routing, or what lies beside it does not fit.
    """
    found = find_arrays(source)
    stored = {name: array for name, array in found.items() if not name.endswith((TOKENS, DECODE_START))}
    for name, array in found.items():
        if name not in stored and (owner := name.rpartition(".")[0]) not in stored:
            raise UserError(f"{array.where}: belongs to {owner!r}, which is not there")
    if not stored:
        raise UserError(f"{source}: holds no sequence")
    for array in stored.values():
        _check_shape(array, geometry)
    alone = source if source.suffix == ".npy" else None
    tokens, starts = (
        {name: found.get(name + ending) if alone is None else beside(alone, ending) for name in stored}
        for ending in (TOKENS, DECODE_START)
    )
    has_token_ids = all_or_none(tokens, source, "token ids")
    told = all_or_none(starts, source, "decode_start")
    lengths = {name: array.shape[0] for name, array in stored.items()}
    decode_starts = {name: read_decode_start(starts[name], length) for name, length in lengths.items()}

    def traces() -> Iterator[Trace]:
        for done, (name, array) in enumerate(stored.items(), 1):
            yield Trace(
                sequence_id=name,
                source=f"{source.resolve().name}: {name}",
                token_ids=read_token_ids(tokens[name], lengths[name]),
                experts=_experts(array, geometry),
                decode_start=decode_starts[name],
            )
            progress(done, len(stored))

    return Recording(
        source=f"routed experts of an engine, {source.resolve().name}",
        lengths=list(lengths.values()),
        traces=traces(),
        author=author_of(list(decode_starts.values()), list(lengths.values())) if told else "unknown",
        has_token_ids=has_token_ids,
    )


def _check_shape(stored: StoredArray, geometry: Geometry) -> None:
    layers, top_k = geometry.num_layers, geometry.top_k
    if len(stored.shape) == 3 and stored.shape[2] == top_k and stored.shape[0] > 0:
        if stored.shape[1] == layers or stored.shape[1] > geometry.moe_layers[-1]:
            return
    raise UserError(
        f"{stored.where}: has shape {stored.shape}, expected (tokens, {layers}, {top_k}) for {geometry.model}'s "
        f"{geometry.describe_shape()}"
    )


def _experts(stored: StoredArray, geometry: Geometry) -> npt.NDArray[Any]:
    """Read the experts ``(T, L, K)``, without the rows of layers that have none."""
    ids, layers = stored.read(), np.array(geometry.moe_layers)
    if ids.shape[1] != len(layers):
        dense = np.delete(ids, layers, axis=1)
        if len(filled := np.flatnonzero((dense != dense.flat[0]).any(axis=(0, 2)))):
            layer = np.delete(np.arange(ids.shape[1]), layers)[filled[0]]
            raise UserError(
                f"{stored.where}: names experts of layer {layer}, which is none of {geometry.model}'s MoE layers"
            )
        ids = ids[:, layers]
    return checked_ids(ids, geometry, lambda token, row: f"{stored.where}: token {token}, layer {layers[row]}")
