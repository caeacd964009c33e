"""Slabs: the layout of one expert's parameters in contiguous memory, and the pool of slots that hold slabs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FIELD_ALIGNMENT = 64
"""Bytes to which each parameter of a slab is aligned; kernels load whole cache lines."""
PAGE = 4096
"""Bytes to which slabs are aligned for direct I/O."""

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


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


class SlotPool:
    """Memory for slots, each of which holds the slab of one expert.

    Args:
        slots: Number of slots.
        layouts: Layouts of all layers; a slot is as large as the largest slab.
        device: Device of the memory.

    Attributes:
        memory: Slots, ``(slots, stride)`` uint8.
        owner: Expert that each slot was given to; -1 for none.
        content: Expert whose parameters each slot holds completely; -1 while they are written.
    """

    def __init__(self, slots: int, layouts: Mapping[Any, SlabLayout], device: torch.device) -> None:
        self.stride = max(layout.stride for layout in layouts.values())
        self.slots = slots
        # One page more than needed, so that the first slot can begin at a page.
        with torch.inference_mode(False):  # reader threads write to it outside of any such block
            whole = torch.empty(slots * self.stride + PAGE, dtype=torch.uint8, device=device)
        begin = -whole.data_ptr() % PAGE
        self.memory = whole[begin : begin + slots * self.stride].view(slots, self.stride)
        self._views: dict[SlabLayout, dict[str, Tensor]] = {}
        self.owner = [-1] * slots
        self.content = [-1] * slots
        self._running: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.slots * self.stride

    def views(self, layout: SlabLayout) -> dict[str, Tensor]:
        """Return a layer's parameters in all slots, ``(slots, *shape)`` by name."""
        if layout not in self._views:
            self._views[layout] = layout.views(self.memory)
        return self._views[layout]

    def slab(self, slot: int) -> Bytes:
        """Return the memory of a slot of a pool on the CPU, ``(stride,)`` uint8."""
        return self.memory[slot].numpy()

    def free(self) -> None:
        """Free the memory, which nobody may use any more; sizes stay."""
        self.memory = self.memory.new_empty(0, self.stride)
        self._views = {}

    def give(self, slot: int, expert: int) -> None:
        """Give a slot to an expert whose parameters are written next.

        Args:
            slot: Number of the slot.
            expert: Expert ``layer * E + expert``.
        """
        assert slot not in self._running, f"slot {slot} of expert {self.owner[slot]} is in use by the running wave"
        self.owner[slot] = expert
        self.content[slot] = -1

    def arrived(self, slot: int, expert: int) -> None:
        """Note that an expert has been written into a slot, which may have another owner by now."""
        if self.owner[slot] == expert:
            self.content[slot] = expert

    def holds(self, slots: list[int], experts: list[int]) -> bool:
        """Return whether slots hold experts completely."""
        return [self.content[slot] for slot in slots] == experts

    def absent(self, slots: Ints, experts: Ints) -> Ints:
        """Return the indices of experts that their slots do not hold completely yet, ascending, ``(m,)`` int64."""
        return np.flatnonzero(np.array([self.content[slot] for slot in slots.tolist()]) != experts)

    def begin_wave(self, slots: list[int]) -> None:
        """Protect the slots of a wave while it computes, until `end_wave`."""
        self._running = set(slots)

    def end_wave(self) -> None:
        """End the running wave."""
        self._running = set()


def _view(memory: Tensor, field: SlabField) -> Tensor:
    size = field.dtype.itemsize
    steps = [math.prod(field.shape[place + 1 :]) for place in range(len(field.shape))]
    flat = memory.view(-1).view(field.dtype)
    return flat.as_strided(
        (len(memory), *field.shape), (memory.stride(0) // size, *steps), flat.storage_offset() + field.offset // size
    )


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
