"""Where the bytes of experts are in files, and where they go in a slab."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_beyond.runtime.slab import SlabField, SlabLayout


class Piece(NamedTuple):
    """Contiguous bytes in a slab.

    Attributes:
        offset: Position in the slab, in bytes.
        length: Number of bytes.
    """

    offset: int
    length: int


class Segment(NamedTuple):
    """Contiguous bytes in a file that are scattered into a slab by one read.

    Attributes:
        file: Number of the file.
        offset: Position in the file, in bytes.
        length: Number of bytes.
        pieces: Places in the slab, in the order of the file.
    """

    file: int
    offset: int
    length: int
    pieces: tuple[Piece, ...]


class Source(NamedTuple):
    """The part of a stored tensor that belongs to one expert; its bytes are contiguous.

    Attributes:
        file: Number of the file.
        offset: Position in the file, in bytes.
        shape: Shape that transformers' converters read.
        dtype: PyTorch type of the stored values.
    """

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Conversion:
    """A parameter of an expert that is computed from stored tensors.

    Attributes:
        field: Parameter in the slab.
        sources: Parts of stored tensors, one per pattern.
        convert: Function from their values, in the type of the parameter, to the parameter.
    """

    field: SlabField
    sources: tuple[Source, ...]
    convert: Callable[[Sequence[Tensor]], Tensor]


class Entry(NamedTuple):
    """The bytes of one expert.

    Attributes:
        segments: Bytes that are copied unchanged.
        conversions: Parameters that are computed.
    """

    segments: tuple[Segment, ...]
    conversions: tuple[Conversion, ...]


@dataclass(frozen=True)
class ExpertIndex:
    """The places of all experts of a model in its files.

    Attributes:
        files: Paths of the files.
        layouts: MoE layer -> layout of its slabs.
        moe_layers: Indices of the model's layers with experts, ascending.
        entries: Expert ``layer * E + expert`` -> its bytes.
    """

    files: tuple[Path, ...]
    layouts: Mapping[int, SlabLayout]
    moe_layers: tuple[int, ...]
    entries: Sequence[Entry]

    @property
    def num_experts(self) -> int:
        """Experts per layer, E."""
        return len(self.entries) // len(self.moe_layers)

    def describe(self, expert: int) -> str:
        """Name an expert and its first file, for error messages."""
        layer, number = divmod(expert, self.num_experts)
        entry = self.entries[expert]
        files = [segment.file for segment in entry.segments]
        files += [source.file for part in entry.conversions for source in part.sources]
        return f"expert {number} of layer {self.moe_layers[layer]} in {self.files[files[0]].name}"
