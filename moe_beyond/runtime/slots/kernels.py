"""Computing a layer's experts in slots.

A layer's own kernel computes on a view of the module whose weights are the slots of the pool. The results are equal
bit by bit: the kernel multiplies the same rows by the same matrices, and adds up a token's experts in the order of its
routes, whatever their slots. ``batched_mm`` copies the slots of all routes. ``eager`` reads one expert after another.
``grouped_mm`` multiplies groups of rows, in most cases in a loop over all groups, whose empty ones cost microseconds
each. So it gets one call per demanded expert. Recent GPUs compute fewer than 1,024 groups in one kernel, which then has
all slots; it chooses its tiles by the mean size of groups, so equality to the last bit is likely there, but not tested.

An event that demands more experts than there are slots runs in waves. In a wave every route is a row of its own with
weight 1; gate weights are applied once, after the last wave. Partial sums of waves would be rounded differently.

Routes to experts that the host computes take the same form. The host computes while a GPU computes the residents, and
only rows are copied between them. Then the output equals the model's up to rounding.
"""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_beyond.cache.cache import Wave
from moe_beyond.errors import UserError
from moe_beyond.runtime.slots.host_kernel import HostKernel, routes_of
from moe_beyond.runtime.slots.registry import NATIVE, eager
from moe_beyond.runtime.slots.views import Groups, Rows, View, groups_in_one_kernel, mapped

MOST_GROUPS = 1024
"""Number of groups that `torch.nn.functional.grouped_mm` refuses on a GPU."""

Ints = npt.NDArray[np.int64]


class Residency(Protocol):
    """Source of waves: makes the experts of an event resident, one wave after another."""

    def event(self, layer: int, routed: Ints, gate_weights: Tensor) -> Iterator[Wave]:
        """Yield the waves of an event; a wave has computed when the next one is requested.

        In these waves, experts whose prefetch is in transit are missing, too.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts of the layer, ``(N, K)`` int64, in router order.
            gate_weights: Weights of the chosen experts, ``(N, K)``.
        """

    def wait(self, experts: list[int]) -> None:
        """Wait until experts of the running wave are in their slots.

        Args:
            experts: Experts ``layer * E + expert``.
        """

    def computed_on_host(self, seconds: float) -> None:
        """Note the seconds in which the host has computed its experts of the running event."""


class SlotKernel:
    """Computes the experts of one layer in slots.

    Args:
        module: Experts module of the layer, without its own weights.
        layer: Position of the layer among the MoE layers.
        num_experts: Number of experts of the layer.
        weights: Parameters of the layer in all slots, ``(slots, *shape)`` by name.
        residency: Source of waves.
        host: Kernel of the experts that the host computes (default: None, it computes none).
    """

    def __init__(
        self,
        module: nn.Module,
        layer: int,
        num_experts: int,
        weights: dict[str, Tensor],
        residency: Residency,
        host: HostKernel | None = None,
    ) -> None:
        self._host = host
        self.layer, self.num_experts, self.residency = layer, num_experts, residency
        self._module, self._weights, self._first = module, weights, layer * num_experts
        first = next(iter(weights.values()))
        self._dtype, slots = first.dtype, len(first)
        self._slot_of = np.zeros(num_experts, np.int64)
        self._all_slots = View(module, weights, slots)

        def wait(expert: int) -> None:  # no method, because a cycle of references would keep the slots' memory
            residency.wait([layer * num_experts + expert])

        rows = {name: Rows(weight, self._slot_of, wait) for name, weight in weights.items()}
        self._by_expert = View(module, rows)
        self._one_call = slots < MOST_GROUPS and groups_in_one_kernel(first)

    def compute(self, kernel: str, hidden_states: Tensor, index: Tensor, gate_weights: Tensor) -> Tensor:
        """Compute the experts of the layer, as the kernel of this name does.

        Args:
            kernel: One of `IMPLEMENTATIONS`; ``eager`` is the forward of the experts' class.
            hidden_states: Input, ``(N, D)``.
            index: Chosen experts, ``(N, K)``.
            gate_weights: Weights of the chosen experts, ``(N, K)``.

        Returns:
            Weighted sum of the experts' outputs, ``(N, D)``.

        Raises:
            UserError: Gradients are requested, or an expert cannot be read.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise UserError(
                "an offloaded model computes no gradients, because its experts leave their slots; call it under "
                "torch.inference_mode()"
            )
        output: Tensor | None = None
        total: Tensor | None = None
        sums = _SumDtype(hidden_states.dtype)
        routed = index.cpu().numpy()  # unlike numpy(force=True), it lets readers run while it waits for a GPU
        for wave in self.residency.event(self.layer, routed, gate_weights):
            self._slot_of[wave.experts - self._first] = wave.slots
            if wave.last and output is None and len(wave.on_host) == 0:
                total = self._compute(kernel, hidden_states, index, gate_weights, wave)
                continue
            if output is None:
                output = hidden_states.new_zeros(index.numel(), hidden_states.shape[-1], dtype=self._dtype)
            with sums:
                self._wave(kernel, hidden_states, index, gate_weights.dtype, wave, output)
        if output is not None and kernel == "eager":
            total = _sum_in_order_of_experts(output, index, gate_weights, sums.dtype)
        elif output is not None:
            total = _sum_in_order_of_routes(output, index, gate_weights)
        assert total is not None, "an event has at least one wave"
        return total.to(hidden_states.dtype)

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles of a model in a run.

        Raises:
            UserError: Always.
        """
        raise UserError("an offloaded model cannot be copied or pickled; do it before or after the run")

    def _compute(self, kernel: str, hidden_states: Tensor, index: Tensor, gate_weights: Tensor, wave: Wave) -> Tensor:
        """Compute an event, or the routes of a wave; experts that are resident go first if the kernel allows it."""
        if kernel == "eager":
            return eager(self._by_expert, hidden_states, index, gate_weights)
        if kernel == "batched_mm" or self._one_call:
            self.residency.wait(wave.experts.tolist())
            return NATIVE[kernel](self._all_slots, hidden_states, mapped(index, self._slot_of), gate_weights)
        experts = wave.experts - self._first
        rank = np.zeros(self.num_experts, np.int64)
        rank[experts] = np.arange(len(experts))
        missing = wave.missing.tolist()
        order = [*sorted(set(range(len(experts))) - set(missing)), *missing]
        groups = {name: Groups(weight, wave, order, self.residency.wait) for name, weight in self._weights.items()}
        view = View(self._module, groups, len(experts))
        return NATIVE[kernel](view, hidden_states, mapped(index, rank), gate_weights)

    def _wave(
        self,
        kernel: str,
        hidden_states: Tensor,
        index: Tensor,
        gate_dtype: torch.dtype,
        wave: Wave,
        output: Tensor,
    ) -> None:
        """Compute the routes of a wave: the residents, then the experts of the host, and then the missing ones."""
        if len(wave.on_host) == 0:
            self._routes(kernel, hidden_states, index, gate_dtype, wave, output)
            return
        assert self._host is not None, "the run has all experts in host memory"
        began = perf_counter()
        taken = self._host.take(hidden_states, index, wave.on_host)  # before a GPU has more to compute
        copied = perf_counter() - began
        missing = np.zeros(len(wave.experts), bool)
        missing[wave.missing] = True
        if not missing.all():
            self._routes(kernel, hidden_states, index, gate_dtype, _part(wave, ~missing), output)
        began = perf_counter()
        self._host.compute(taken, gate_dtype, output)
        self.residency.computed_on_host(copied + perf_counter() - began)
        if missing.any():
            self._routes(kernel, hidden_states, index, gate_dtype, _part(wave, missing), output)

    def _routes(
        self,
        kernel: str,
        hidden_states: Tensor,
        index: Tensor,
        gate_dtype: torch.dtype,
        wave: Wave,
        output: Tensor,
    ) -> None:
        """Compute the routes of a wave, each with weight 1, into the rows ``(N * K, D)`` of the output."""
        experts = wave.experts - self._first
        routes = routes_of(index, experts, self.num_experts)
        chosen = flat = index.reshape(-1)
        if kernel == "batched_mm":
            # Its product depends on the number of rows. So all routes are computed, those of other waves by any expert.
            chosen = flat.clone()
            other = torch.ones_like(flat, dtype=torch.bool)
            other[routes] = False
            chosen[other] = int(experts[0])
            rows = torch.arange(len(flat), device=flat.device)
        else:
            rows = routes
        ones = torch.ones(len(rows), 1, dtype=gate_dtype, device=flat.device)
        states = hidden_states[torch.div(rows, index.shape[-1], rounding_mode="floor")]
        result = self._compute(kernel, states, chosen[rows][:, None], ones, wave)
        output[routes] = (result[routes] if kernel == "batched_mm" else result).to(output.dtype)


def _part(wave: Wave, chosen: npt.NDArray[np.bool_]) -> Wave:
    """Return some experts of a wave; the missing ones stay missing."""
    missing = np.flatnonzero(np.isin(np.flatnonzero(chosen), wave.missing))
    return Wave(wave.experts[chosen], wave.slots[chosen], missing, wave.last, wave.on_host[:0])


def _sum_in_order_of_routes(output: Tensor, index: Tensor, gate_weights: Tensor) -> Tensor:
    """Weight the routes and sum those of each token, as the kernels ``grouped_mm`` and ``batched_mm`` do."""
    weighted = output * gate_weights.reshape(-1, 1)
    return weighted.view(*index.shape, -1).sum(dim=1)


def _sum_in_order_of_experts(output: Tensor, index: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight the routes and add them to their tokens, the lowest expert first, as the kernel ``eager`` does."""
    total = output.new_zeros(len(index), output.shape[-1], dtype=dtype)
    flat, weights = index.reshape(-1), gate_weights.reshape(-1, 1)
    for expert in sorted(set(flat.tolist())):
        routes = (flat == expert).nonzero().reshape(-1)
        tokens = torch.div(routes, index.shape[-1], rounding_mode="floor")
        total.index_add_(0, tokens, (output[routes] * weights[routes]).to(total.dtype))
    return total


class _SumDtype(TorchFunctionMode):
    """Records the data type in which an eager forward sums: that of most classes is the type of the hidden states.

    Args:
        dtype: Data type before the first sum is seen.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.index_add_:
            self.dtype = args[0].dtype
        return func(*args, **(kwargs or {}))
