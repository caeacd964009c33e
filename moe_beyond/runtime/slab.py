"""Slabs: the layout of one expert's parameters in contiguous memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FIELD_ALIGNMENT = 64
"""Bytes to which each parameter of a slab is aligned; kernels load whole cache lines."""
PAGE = 4096
"""Bytes to which slabs are aligned for direct I/O."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SlabField:
    """One parameter of an expert.

    Attributes:
        name: Name of the parameter in its experts module, such as ``"gate_up_proj"``.
        shape: Shape of the parameter of one expert, without the leading dimension of experts.
        dtype: PyTorch type of the values.
        offset: Position in the slab, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class SlabLayout:
    """Positions of an expert's parameters in a slab.

    Attributes:
        fields: Parameters by position, with gaps of less than `FIELD_ALIGNMENT` bytes.
        stride: Size of a slab in bytes, a multiple of its alignment.
    """

    fields: tuple[SlabField, ...]
    stride: int

    @classmethod
    def of(
        cls, parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]], alignment: int = FIELD_ALIGNMENT
    ) -> "SlabLayout":
        """Lay out parameters one after another.

        Args:
            parameters: Name -> shape for one expert, and data type; the slab keeps this order.
            alignment: Bytes to which slabs are aligned, a multiple of `FIELD_ALIGNMENT` (default: that).
        """
        fields, end = [], 0
        for name, (shape, dtype) in parameters.items():
            field = SlabField(name, tuple(shape), dtype, _rounded_up(end, FIELD_ALIGNMENT))
            fields.append(field)
            end = field.offset + field.nbytes
        return cls(tuple(fields), _rounded_up(end, alignment))

    @cached_property
    def params(self) -> int:
        """Number of parameters of an expert."""
        return sum(field.numel for field in self.fields)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of an expert's parameters, without gaps."""
        return sum(field.nbytes for field in self.fields)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Return the parameters in slabs.

        Args:
            memory: Memory for one slab per row, ``(n, bytes)`` uint8, contiguous.

        Returns:
            Name -> parameter of all slabs, ``(n, *shape)``, which shares the memory.
        """
        return {field.name: _view(memory, field) for field in self.fields}


def _view(memory: Tensor, field: SlabField) -> Tensor:
    size = field.dtype.itemsize
    steps = [math.prod(field.shape[place + 1 :]) for place in range(len(field.shape))]
    flat = memory.view(-1).view(field.dtype)
    return flat.as_strided(
        (len(memory), *field.shape), (memory.stride(0) // size, *steps), flat.storage_offset() + field.offset // size
    )


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
