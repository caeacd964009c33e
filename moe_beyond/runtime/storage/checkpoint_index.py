"""The byte ranges of every expert in the safetensors files of a checkpoint, as they are.

transformers renames stored tensors and converts them to the parameters of its modules. Its own renamings assign keys to
experts. A conversion that only moves values is found without knowledge of its operations: applied to the addresses of
the values, it returns addresses, and their contiguous runs are byte ranges. Other conversions run at each read.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moe_beyond.collect.load import EXPERTS_FILE, Checkpoint
from moe_beyond.errors import UserError
from moe_beyond.pretrained import CONFIG_FILE
from moe_beyond.runtime.experts import ExpertsLayer
from moe_beyond.runtime.slab import SlabField
from moe_beyond.runtime.storage.expert_index import Conversion, Entry, ExpertIndex, Piece, Segment, Source
from moe_beyond.runtime.storage.packed_experts import packed_index
from moe_beyond.runtime.storage.stored_tensors import stored_tensors
from moe_beyond.safe_text import brief
from moe_beyond.safetensors_header import DTYPES, StoredTensor

SHORTEST_RUN = 64
"""Bytes of the shortest run that is read directly into a slab; below it, a read has too many pieces."""
COMPLETE = "give the complete checkpoint of the model"


class _Run(NamedTuple):
    """Values that are contiguous both in a source and in a parameter; all numbers count values."""

    source: int
    begin: int
    place: int
    length: int


def index_checkpoint(checkpoint: Checkpoint, model: Any, layers: Mapping[int, ExpertsLayer]) -> ExpertIndex:
    """Find the bytes of every expert of a checkpoint, packed or not.

    Args:
        checkpoint: Files of the model.
        model: Model of transformers, with or without the parameters of its experts.
        layers: Experts, as `experts_layers` returns them; their layouts have the types to compute in.

    Raises:
        UserError: A file is damaged; or an expert is missing or has the wrong shape.
    """
    where = f"model {checkpoint.name}"
    if (packed := checkpoint.folder / EXPERTS_FILE).is_file():
        return packed_index(packed, layers)
    stored = stored_tensors(checkpoint.folder, where)
    files = sorted({tensor.file for tensor in stored.values()})
    builder = _Builder(where, model, stored, {path: number for number, path in enumerate(files)})
    assigned, converters = assign_keys(model, layers, stored)
    keys: dict[str, dict[str | None, list[str]]] = {name: {} for name in expert_parameters(layers)}
    for key, (name, pattern) in assigned.items():
        if name in keys:
            keys[name].setdefault(pattern, []).append(key)
    entries = []
    for layer in layers.values():
        by_expert = [
            builder.parameter(layer, field, keys[f"{layer.name}.{field.name}"], converters)
            for field in layer.layout.fields
        ]
        entries += [builder.entry(parts) for parts in zip(*by_expert, strict=True)]
    layouts = {position: layer.layout for position, layer in layers.items()}
    return ExpertIndex(tuple(files), layouts, tuple(layer.layer for layer in layers.values()), entries)


def assign_keys(
    model: Any, layers: Mapping[int, ExpertsLayer], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, tuple[str, str | None]], dict[str, WeightConverter]]:
    """Assign stored tensors to parameters, as transformers does.

    Args:
        model: Model of transformers, with or without the parameters of its experts.
        layers: Experts of the model.
        stored: Key -> stored tensor.

    Returns:
        Key -> parameter and source pattern (None for a parameter that is stored as it is), without keys that the model
        does not use, in natural order; and source pattern -> converter.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = dict.fromkeys([*model.state_dict(), *expert_parameters(layers)], True)
    assigned = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # transformers keeps a name that the model has
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name in state:
            assigned[key] = name, pattern
    return assigned, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def expert_parameters(layers: Mapping[int, ExpertsLayer]) -> set[str]:
    """Return the names of the parameters that hold experts."""
    return {f"{layer.name}.{field.name}" for layer in layers.values() for field in layer.layout.fields}


class _Builder:
    """Turns keys into entries; equal cases are computed once.

    Args:
        where: Name of the model, for messages.
        model: Model of transformers.
        stored: Key -> stored tensor.
        numbers: Path -> number of the file.
    """

    def __init__(self, where: str, model: Any, stored: Mapping[str, StoredTensor], numbers: Mapping[Path, int]) -> None:
        self.where, self.model, self.stored, self.numbers = where, model, stored, numbers
        self._runs: dict[Any, tuple[_Run, ...] | None] = {}
        self._templates: dict[Any, tuple[Segment, ...]] = {}

    def parameter(
        self,
        layer: ExpertsLayer,
        field: SlabField,
        keys: Mapping[str | None, Sequence[str]],
        converters: Mapping[str, WeightConverter],
    ) -> list[tuple[SlabField, tuple[Source, ...], tuple[_Run, ...] | Conversion]]:
        """Find one parameter of all experts of a layer.

        Returns:
            Parameter, its sources, and their runs or a conversion; by expert.
        """
        name = f"{layer.name}.{field.name}"
        if not keys:
            raise UserError(f"{self.where}: its files lack the experts of layer {layer.layer} ({name}); {COMPLETE}")
        by_pattern = [self._by_expert(layer, field, list(names)) for names in keys.values()]
        convert = partial(_convert, name, self.model, tuple(keys), converters.get(next(iter(keys)) or ""))
        result: list[tuple[SlabField, tuple[Source, ...], tuple[_Run, ...] | Conversion]] = []
        for expert, sources in enumerate(zip(*by_pattern, strict=True)):
            kind = field, tuple(keys), tuple((source.shape, source.dtype) for source in sources)
            if kind not in self._runs:
                try:
                    self._runs[kind] = _placement(convert, sources, field)
                except Exception as error:  # operations of transformers raise any exception for wrong shapes
                    raise UserError(
                        f"{self.where}: the weights of expert {expert} of layer {layer.layer} do not have the shapes "
                        f"of its {CONFIG_FILE} ({name}: {brief(error)}); give the complete files of one model"
                    ) from error
            runs = self._runs[kind]
            result.append((field, sources, Conversion(field, sources, convert) if runs is None else runs))
        return result

    def _by_expert(self, layer: ExpertsLayer, field: SlabField, keys: list[str]) -> list[Source]:
        """Return the part of each expert in the stored tensors of one pattern."""
        count = layer.num_experts
        first = self.stored[keys[0]]
        if len(keys) == 1 and first.shape[:1] == (count,) and len(first.shape) == len(field.shape) + 1:
            size, shape = first.nbytes // count, (1, *first.shape[1:])
            place, dtype = self.numbers[first.file], DTYPES[first.dtype]
            return [Source(place, first.offset + expert * size, shape, dtype) for expert in range(count)]
        experts = _numbers_of_experts(keys)
        if lacking := sorted(set(range(count)) - set(experts)):
            raise UserError(
                f"{self.where}: its files lack expert {lacking[0]} of layer {layer.layer}, whose tensors are named as "
                f"{keys[0]}; {COMPLETE}"
            )
        if experts != list(range(count)):
            raise UserError(
                f"{self.where}: layer {layer.layer} has more experts than its {CONFIG_FILE} allows (got {keys[-1]} for "
                f"{count} experts); give the complete files of one model"
            )
        tensors = [self.stored[key] for key in keys]
        return [Source(self.numbers[t.file], t.offset, t.shape, DTYPES[t.dtype]) for t in tensors]

    def entry(self, parts: Sequence[tuple[SlabField, tuple[Source, ...], tuple[_Run, ...] | Conversion]]) -> Entry:
        """Join the parameters of one expert; byte ranges that are adjacent in a file become one."""
        conversions = tuple(part for _, _, part in parts if isinstance(part, Conversion))
        placed = [(field, sources, runs) for field, sources, runs in parts if not isinstance(runs, Conversion)]
        if not placed:
            return Entry((), conversions)
        base = min(source.offset for _, sources, _ in placed for source in sources)
        kind = tuple(
            (field, id(runs), tuple((source.file, source.offset - base) for source in sources))
            for field, sources, runs in placed
        )
        if kind not in self._templates:
            self._templates[kind] = _segments(placed, base)
        segments = tuple(segment._replace(offset=base + segment.offset) for segment in self._templates[kind])
        return Entry(segments, conversions)


def _numbers_of_experts(keys: Sequence[str]) -> list[int]:
    """Return the expert number in each key: the number in which the keys differ.

    Example:
        >>> _numbers_of_experts(["layers.3.w2.0.weight", "layers.3.w2.2.weight"])
        [0, 2]
    """
    columns = zip(*(re.findall(r"\d+", key) for key in keys), strict=False)
    varying = [column for column in columns if len(set(column)) > 1]
    return [int(number) for number in varying[0]] if varying else list(range(len(keys)))


def _convert(
    name: str, model: Any, patterns: tuple[str | None, ...], converter: WeightConverter | None, values: Sequence[Tensor]
) -> Tensor:
    """Convert the stored tensors of one expert to its row of a parameter."""
    if converter is None:
        return values[0][0]
    own = deepcopy(converter)
    for pattern, value in zip(patterns, values, strict=True):
        own.collected_tensors[pattern].append(value)  # type: ignore[index, arg-type]
    rows = own.convert(name, model=model, config=model.config)[name]
    row: Tensor = (rows[0] if isinstance(rows, list) else rows)[0]
    return row


def _placement(
    convert: Callable[[Sequence[Tensor]], Tensor], sources: Sequence[Source], field: SlabField
) -> tuple[_Run, ...] | None:
    """Find the runs of a conversion that moves values without a change; None if it changes them or moves single values.

    Raises:
        ValueError: The result does not have the shape of the parameter.
    """
    sizes = [math.prod(source.shape) for source in sources]
    # The gap of one address between sources ends a run there.
    bases = np.cumsum([0, *(size + 1 for size in sizes)])
    kind = torch.int32 if bases[-1] < 2**31 else torch.int64  # a large expert has hundreds of millions of values
    result = convert(
        [
            torch.arange(int(base), int(base) + size, dtype=kind).view(source.shape)
            for base, size, source in zip(bases, sizes, sources, strict=False)
        ]
    )
    if tuple(result.shape) != field.shape:
        raise ValueError(f"{list(result.shape)}, not {list(field.shape)}")
    if result.dtype != kind or any(source.dtype != field.dtype for source in sources):
        return None
    flat = result.reshape(-1).numpy()
    places = np.concatenate([[0], np.flatnonzero(flat[1:] - flat[:-1] != 1) + 1])
    lengths = np.diff(places, append=len(flat))
    begins = flat[places].astype(np.int64)
    owners = np.searchsorted(bases, begins, side="right") - 1
    # Addresses outside of the sources, or in a gap, were computed and not moved.
    ends = np.append(bases[:-1] + sizes, 0)[owners]
    if (owners < 0).any() or (begins + lengths > ends).any():
        return None
    if lengths.min() * field.dtype.itemsize < min(SHORTEST_RUN, field.nbytes):
        return None
    columns = owners, begins - bases[owners], places, lengths
    return tuple(_Run(*map(int, run)) for run in zip(*columns, strict=True))


def _segments(
    placed: Sequence[tuple[SlabField, tuple[Source, ...], tuple[_Run, ...]]], base: int
) -> tuple[Segment, ...]:
    """Join runs that are adjacent in a file; offsets in files count from a base."""
    ranges = sorted(
        (
            sources[run.source].file,
            sources[run.source].offset - base + run.begin * field.dtype.itemsize,
            field.offset + run.place * field.dtype.itemsize,
            run.length * field.dtype.itemsize,
        )
        for field, sources, runs in placed
        for run in runs
    )
    segments: list[tuple[int, int, list[Piece]]] = []
    end = -1, -1
    for file, offset, place, length in ranges:
        if end != (file, offset):
            segments.append((file, offset, []))
        pieces = segments[-1][2]
        if pieces and sum(pieces[-1]) == place:
            pieces[-1] = Piece(pieces[-1].offset, pieces[-1].length + length)
        else:
            pieces.append(Piece(place, length))
        end = file, offset + length
    return tuple(
        Segment(file, offset, sum(piece.length for piece in pieces), tuple(pieces)) for file, offset, pieces in segments
    )
