"""Computing missing experts on the host, from their place in host memory."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_beyond.runtime.slab import SlabField
from moe_beyond.runtime.slots.registry import eager
from moe_beyond.runtime.slots.views import View
from moe_beyond.runtime.storage.store import HostStore

Ints = npt.NDArray[np.int64]


class StoredRows:
    """A parameter of all experts that is indexed by one expert's id, in host memory.

    Args:
        store: Store with the experts.
        first: Expert 0 of the layer, as ``layer * E``.
        field: Parameter of one expert.
    """

    def __init__(self, store: HostStore, first: int, field: SlabField) -> None:
        self._store, self._first, self._field = store, first, field

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """Return the parameter of an expert, which shares the store's memory."""
        return self._store.parameter(self._first + int(expert), self._field)


class HostRoutes(NamedTuple):
    """Routes of an event that the host computes.

    Attributes:
        rows: Rows of the routes, ``(r,)`` int64, on the model's device.
        experts: Chosen expert of each, ``(r, 1)`` int64, on the CPU.
        states: Input of each, ``(r, D)``, on the CPU.
    """

    rows: Tensor
    experts: Tensor
    states: Tensor


class HostKernel:
    """Computes experts of one layer on the CPU, with the forward of the experts' class.

    Args:
        module: Experts module of the layer.
        layer: Position of the layer among the MoE layers.
        num_experts: Number of experts of the layer.
        store: Store with the experts.
    """

    def __init__(self, module: nn.Module, layer: int, num_experts: int, store: HostStore) -> None:
        self._first, self._num_experts = layer * num_experts, num_experts
        fields = store.layouts[layer].fields
        self._view = View(module, {field.name: StoredRows(store, self._first, field) for field in fields})

    def take(self, hidden_states: Tensor, index: Tensor, experts: Ints) -> HostRoutes:
        """Copy the inputs of routes to the host.

        Args:
            hidden_states: Input of the layer, ``(N, D)``.
            index: Chosen experts, ``(N, K)``.
            experts: Experts ``layer * E + expert`` that the host computes, ``(h,)``.
        """
        rows = routes_of(index, experts - self._first, self._num_experts)
        states = hidden_states[torch.div(rows, index.shape[-1], rounding_mode="floor")]
        return HostRoutes(rows, index.reshape(-1)[rows][:, None].cpu(), states.cpu())

    def compute(self, routes: HostRoutes, gate_dtype: torch.dtype, output: Tensor) -> None:
        """Compute routes, each with weight 1, into their rows of the output ``(N * K, D)``."""
        ones = torch.ones(len(routes.experts), 1, dtype=gate_dtype)
        result = eager(self._view, routes.states, routes.experts, ones)
        output[routes.rows] = result.to(output.device, output.dtype)


def routes_of(index: Tensor, experts: Ints, num_experts: int) -> Tensor:
    """Return the rows of the routes to some experts, ``(r,)`` int64, on the device of the index.

    Args:
        index: Chosen experts of the layer, ``(N, K)``.
        experts: Experts of the layer, ``(n,)``.
        num_experts: Number of experts of the layer.
    """
    chosen = np.zeros(num_experts, bool)
    chosen[experts] = True
    flat = index.reshape(-1)
    return torch.from_numpy(chosen).to(flat.device)[flat].nonzero().reshape(-1)
