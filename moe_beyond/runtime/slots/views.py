"""Views of slots as the weights of an experts module, for the kernels of transformers.

A kernel reads weights in one of three ways: all rows at once, one expert's row, or groups of rows. In the last two, it
waits for an expert when it needs it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_beyond.cache.cache import Wave

Ints = npt.NDArray[np.int64]


def mapped(index: Tensor, numbers: Ints) -> Tensor:
    """Return the number of each expert id, of the same shape."""
    if index.device.type == "cpu":
        return torch.from_numpy(numbers[index.numpy()])
    return torch.from_numpy(numbers).to(index.device)[index]


def groups_in_one_kernel(weight: Tensor) -> bool:
    """Return whether ``grouped_mm`` computes all groups in one kernel, instead of in a loop over the groups."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


class View:
    """An experts module as a kernel sees it, with other weights and another number of experts.

    Args:
        module: Experts module whose other attributes the kernel reads.
        weights: Weights by the names of the module's parameters.
        num_experts: Number of rows of the weights (default: that of the module).
    """

    def __init__(self, module: nn.Module, weights: dict[str, Any], num_experts: int | None = None) -> None:
        self.__dict__.update(weights, _module=module)
        if num_experts is not None:
            self.__dict__["num_experts"] = num_experts

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module."""
        value = getattr(self._module, name)
        # Methods of the module, such as its gate, must read the weights of the view.
        function = getattr(value, "__func__", None)
        return value if function is None or value.__self__ is not self._module else function.__get__(self)


class Rows:
    """A parameter of all experts that is indexed by one expert's id, as the kernel ``eager`` does.

    Args:
        weight: Parameter in all slots, ``(slots, *shape)``.
        slot_of: Slot of each expert of the layer, ``(E,)``.
        wait: Function that waits until an expert is in its slot.
    """

    def __init__(self, weight: Tensor, slot_of: Ints, wait: Callable[[int], None]) -> None:
        self._weight, self._slot_of, self._wait = weight, slot_of, wait

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """Return the parameter of an expert."""
        number = int(expert)
        self._wait(number)
        return self._weight[self._slot_of[number]]


class Groups:
    """A parameter of a wave's experts in slots, as the kernel ``grouped_mm`` uses it.

    Args:
        weight: Parameter in all slots, ``(slots, *shape)``.
        wave: Wave whose experts are the groups.
        order: Order in which the groups are computed: those in transit last.
        wait: Function that waits until experts are in their slots.
    """

    def __init__(self, weight: Tensor, wave: Wave, order: list[int], wait: Callable[[list[int]], None]) -> None:
        self._weight, self._wave, self._order, self._wait = weight, wave, order, wait
        self.dtype, self.device = weight.dtype, weight.device

    def __getitem__(self, groups: Tensor) -> Tensor:
        """Return the rows of a bias for the groups of routes."""
        self._wait(self._wave.experts.tolist())
        return self._weight[mapped(groups, self._wave.slots)]

    def transpose(self, first: int, second: int) -> "Groups":
        """Return the transposed parameter."""
        return Groups(self._weight.transpose(first, second), self._wave, self._order, self._wait)

    def data_ptr(self) -> int:
        """Return the address of the first slot, whose alignment is that of all."""
        return self._weight.data_ptr()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply each group of rows by the parameter in its slot."""
        rows, groups = args[:2]
        return groups._multiplied(func, rows, (kwargs or {})["offs"])  # noqa: SLF001

    def _multiplied(self, grouped_mm: Callable[..., Tensor], rows: Tensor, ends: Tensor) -> Tensor:
        experts, slots, bounds = self._wave.experts.tolist(), self._wave.slots.tolist(), [0, *ends.tolist()]
        sizes = [end - begin for begin, end in pairwise(bounds)]
        output = rows.new_empty(len(rows), self._weight.shape[-1])
        in_one_kernel = groups_in_one_kernel(self._weight)
        groups, results = rows.split_with_sizes(sizes), output.split_with_sizes(sizes)
        for group in self._order:
            self._wait([experts[group]])
            slot = slots[group]
            if not in_one_kernel:  # grouped_mm calls mm for each group, too, and waits for the device each time
                torch.mm(groups[group], self._weight[slot], out=results[group])
            else:
                end = ends[group : group + 1] - bounds[group]
                results[group].copy_(grouped_mm(groups[group], self._weight[slot : slot + 1], offs=end))
        return output
