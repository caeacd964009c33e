"""The pool of slots: the memory in which experts compute."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import PAGE, Bytes, SlabLayout

Ints = npt.NDArray[np.int64]


class SlotPool:
    """Memory for slots, each of which holds the slab of one expert.

    Args:
        slots: Number of slots.
        layouts: Layouts of all layers; a slot is as large as the largest slab.
        device: Device of the memory.

    Raises:
        UserError: The device has too little memory.

    Attributes:
        memory: Slots, ``(slots, stride)`` uint8.
        owner: Expert that each slot was given to; -1 for none.
        content: Expert whose parameters each slot holds completely; -1 while they are written.
    """

    def __init__(self, slots: int, layouts: Mapping[Any, SlabLayout], device: torch.device) -> None:
        self.stride = max(layout.stride for layout in layouts.values())
        self.slots = slots
        # One page more than needed, so that the first slot can begin at a page.
        try:
            with torch.inference_mode(False):  # reader threads write to it outside of any such block
                whole = torch.empty(slots * self.stride + PAGE, dtype=torch.uint8, device=device)
                if device.type == "cpu":  # the system gives a page at its first use, which would slow the first reads
                    whole[::PAGE] = 0
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            raise UserError(
                f"budget: {slots:,} slots of {self.stride:,} bytes do not fit into the memory of {device}; give a "
                "smaller budget"
            ) from error
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
