"""Stores of experts: the protocol, and the store in host memory."""

import mmap
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_beyond.runtime.experts import ExpertsLayer
from moe_beyond.runtime.slab import Bytes, SlabField, SlabLayout


class BytesBySource(NamedTuple):
    """Bytes that were read for one expert, by the place they came from.

    They are bytes as stored: a checkpoint in float32 has twice the bytes of its experts in bfloat16.

    Attributes:
        host: Bytes of host memory that this process holds (default: 0).
        page_cache: Bytes of file pages that were in memory (default: 0).
        disk: Bytes that came from the disk (default: 0).
    """

    host: int = 0
    page_cache: int = 0
    disk: int = 0


class ExpertStore(Protocol):
    """Where experts are while they have no slot; an expert is ``layer * E + expert``.

    Attributes:
        layouts: MoE layer -> layout of its slabs.
        nbytes: Host memory that the store occupies, in bytes.
        in_memory: Whether reads are copies in memory, which cannot hang.
    """

    layouts: Mapping[int, SlabLayout]
    nbytes: int
    in_memory: bool

    def read(self, expert: int, slab: Bytes) -> BytesBySource:
        """Write an expert into a slab; several threads may read at once.

        Args:
            expert: Expert ``layer * E + expert``.
            slab: Memory of at least ``layout.stride`` bytes.
        """

    def describe(self, expert: int) -> str:
        """Name an expert and its place, for error messages."""

    def close(self) -> None:
        """Free files and memory; may be called again."""


class Part(NamedTuple):
    """Contiguous bytes of an expert in host memory.

    Attributes:
        offset: Position in the slab, in bytes.
        source: Bytes, ``(n,)`` uint8.
    """

    offset: int
    source: Bytes


class HostStore:
    """Experts in host memory.

    Args:
        layouts: MoE layer -> layout of its slabs.
        parts: Expert -> its bytes.
        memory: Arrays that contain all parts, uint8; a CUDA copier registers them.
    """

    in_memory = True

    def __init__(
        self, layouts: Mapping[int, SlabLayout], parts: Sequence[tuple[Part, ...]], memory: Sequence[Bytes]
    ) -> None:
        self.layouts = layouts
        self.parts = parts
        self.memory = memory
        self.nbytes = sum(array.nbytes for array in memory)

    @classmethod
    def of_model(cls, layers: Mapping[int, ExpertsLayer]) -> "HostStore":
        """Use the parameters of a model, without a copy if they are contiguous and on the CPU.

        Args:
            layers: Experts, as `find_offloadable` returns them.
        """
        parts: list[tuple[Part, ...]] = []
        memory: list[Bytes] = []
        for layer in layers.values():
            rows = {}
            for field in layer.layout.fields:
                parameter = getattr(layer.module, field.name).detach().cpu().contiguous()
                rows[field.offset] = parameter.view(layer.num_experts, -1).view(torch.uint8).numpy()
            memory += rows.values()
            parts += [
                tuple(Part(offset, array[expert]) for offset, array in rows.items())
                for expert in range(layer.num_experts)
            ]
        return cls({position: layer.layout for position, layer in layers.items()}, parts, memory)

    @classmethod
    def filled(cls, source: ExpertStore, num_experts: int) -> "HostStore":
        """Read all experts of another store once, into one anonymous allocation of exact size.

        Args:
            source: Store to read from, which stays open.
            num_experts: Experts per layer, E.
        """
        strides = [layout.stride for _, layout in sorted(source.layouts.items()) for _ in range(num_experts)]
        ends = np.cumsum(strides)
        memory = np.frombuffer(mmap.mmap(-1, int(ends[-1])), np.uint8)
        slabs = [memory[end - stride : end] for end, stride in zip(ends, strides, strict=True)]
        for expert, slab in enumerate(slabs):
            source.read(expert, slab)
        return cls(source.layouts, [(Part(0, slab),) for slab in slabs], [memory])

    def read(self, expert: int, slab: Bytes) -> BytesBySource:
        """Copy an expert into a slab; numpy releases the GIL meanwhile."""
        size = 0
        for offset, source in self.parts[expert]:
            slab[offset : offset + len(source)] = source
            size += len(source)
        return BytesBySource(host=size)

    def parameter(self, expert: int, field: SlabField) -> Tensor:
        """Return a parameter of an expert, ``field.shape``, which shares the memory.

        Args:
            expert: Expert ``layer * E + expert``.
            field: Parameter of the layer's layout.
        """
        for offset, source in self.parts[expert]:
            if offset <= field.offset < offset + len(source):
                content = torch.from_numpy(source[field.offset - offset :][: field.nbytes])
                return content.view(field.dtype).view(field.shape)
        raise AssertionError(f"{self.describe(expert)} has no {field.name}")

    def describe(self, expert: int) -> str:
        """Name an expert, for error messages."""
        layer, number = divmod(expert, len(self.parts) // len(self.layouts))
        return f"expert {number} of MoE layer {layer} in host memory"

    def close(self) -> None:
        """Release the memory, which is freed once nobody else uses it."""
        self.parts, self.memory, self.nbytes = (), (), 0
