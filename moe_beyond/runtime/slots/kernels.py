"""Computing a layer's experts in slots, behind transformers' experts registry.

transformers looks up the function that computes a layer's experts by the name of a kernel. Here the three names that
run on every device get a function that serves the layers of offloaded models and passes all other modules on. So
transformers' own switch between kernels, from prefill to decode on a GPU, works unchanged.

A layer's own kernel computes on a view of the module whose weights are the slots of the pool. The results are equal
bit by bit: the kernel multiplies the same rows by the same matrices, and adds up a token's experts in the order of its
routes, whatever their slots. ``batched_mm`` copies the slots of all routes. ``eager`` reads one expert after another.
``grouped_mm`` multiplies groups of rows, in most cases in a loop over all groups, whose empty ones cost microseconds
each. So it gets one call per demanded expert. Recent GPUs compute fewer than 1,024 groups in one kernel, which then has
all slots; it chooses its tiles by the mean size of groups, so equality to the last bit is likely there, but not tested.

An event that demands more experts than there are slots runs in waves. In a wave every route is a row of its own with
weight 1; gate weights are applied once, after the last wave. Partial sums of waves would be rounded differently.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_beyond.cache.cache import Wave
from moe_beyond.errors import UserError
from moe_beyond.runtime.experts import IMPLEMENTATIONS

MOST_GROUPS = 1024
"""Number of groups that `torch.nn.functional.grouped_mm` refuses on a GPU."""
COMPILED = (
    "an offloaded model cannot be compiled, because its experts leave their slots; call it without torch.compile, or "
    "pass disable_compile=True to generate"
)
"""Refusal of ``torch.compile``; `generate` compiles models with static caches on a GPU."""
ATTRIBUTE = "_moe_beyond_slots"
"""Attribute of an experts module that holds its `SlotKernel`."""

Ints = npt.NDArray[np.int64]


class Residency(Protocol):
    """Source of waves: makes the experts of an event resident, one wave after another."""

    def event(self, layer: int, routed: Ints) -> Iterator[Wave]:
        """Yield the waves of an event; a wave has computed when the next one is requested.

        In these waves, experts whose prefetch is in transit are missing, too.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts of the layer, ``(N, K)`` int64, in router order.
        """

    def wait(self, experts: list[int]) -> None:
        """Wait until experts of the running wave are in their slots.

        Args:
            experts: Experts ``layer * E + expert``.
        """


class SlotKernel:
    """Computes the experts of one layer in slots.

    Args:
        module: Experts module of the layer, without its own weights.
        layer: Position of the layer among the MoE layers.
        num_experts: Number of experts of the layer.
        weights: Parameters of the layer in all slots, ``(slots, *shape)`` by name.
        residency: Source of waves.
    """

    def __init__(
        self, module: nn.Module, layer: int, num_experts: int, weights: dict[str, Tensor], residency: Residency
    ) -> None:
        self.layer, self.num_experts, self.residency = layer, num_experts, residency
        self._module, self._weights, self._first = module, weights, layer * num_experts
        first = next(iter(weights.values()))
        self._dtype, slots = first.dtype, len(first)
        self._slot_of = np.zeros(num_experts, np.int64)
        self._all_slots = _View(module, weights, slots)

        def wait(expert: int) -> None:  # no method, because a cycle of references would keep the slots' memory
            residency.wait([layer * num_experts + expert])

        rows = {name: _Rows(weight, self._slot_of, wait) for name, weight in weights.items()}
        self._by_expert = _View(module, rows)
        self._one_call = slots < MOST_GROUPS and _groups_in_one_kernel(first)

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
        routed = index.numpy(force=True)
        for wave in self.residency.event(self.layer, routed):
            self._slot_of[wave.experts - self._first] = wave.slots
            if wave.last and output is None:
                total = self._compute(kernel, hidden_states, index, gate_weights, wave)
                continue
            if output is None:
                output = hidden_states.new_zeros(index.numel(), hidden_states.shape[-1], dtype=self._dtype)
            with sums:
                self._routes(kernel, hidden_states, index, gate_weights.dtype, wave, output)
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
            return _eager(self._by_expert, hidden_states, index, gate_weights)
        if kernel == "batched_mm" or self._one_call:
            self.residency.wait(wave.experts.tolist())
            return _NATIVE[kernel](self._all_slots, hidden_states, _mapped(index, self._slot_of), gate_weights)
        experts = wave.experts - self._first
        rank = np.zeros(self.num_experts, np.int64)
        rank[experts] = np.arange(len(experts))
        missing = wave.missing.tolist()
        order = [*sorted(set(range(len(experts))) - set(missing)), *missing]
        groups = {name: _Groups(weight, wave, order, self.residency.wait) for name, weight in self._weights.items()}
        view = _View(self._module, groups, len(experts))
        return _NATIVE[kernel](view, hidden_states, _mapped(index, rank), gate_weights)

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
        in_wave = np.zeros(self.num_experts, bool)
        in_wave[experts] = True
        flat = index.reshape(-1)
        routes = torch.from_numpy(in_wave).to(flat.device)[flat].nonzero().reshape(-1)
        chosen = flat
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


def _groups_in_one_kernel(weight: Tensor) -> bool:
    """Return whether ``grouped_mm`` computes all groups in one kernel, instead of in a loop over the groups."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


def _mapped(index: Tensor, numbers: Ints) -> Tensor:
    """Return the number of each expert id, of the same shape."""
    if index.device.type == "cpu":
        return torch.from_numpy(numbers[index.numpy()])
    return torch.from_numpy(numbers).to(index.device)[index]


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


class _View:
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
        value = getattr(self._module, name)
        # Methods of the module, such as its gate, must read the weights of the view.
        function = getattr(value, "__func__", None)
        return value if function is None or value.__self__ is not self._module else function.__get__(self)


class _Rows:
    """A parameter of all experts that is indexed by one expert's id, as the kernel ``eager`` does.

    Args:
        weight: Parameter in all slots, ``(slots, *shape)``.
        slot_of: Slot of each expert of the layer, ``(E,)``.
        wait: Function that waits until an expert is in its slot.
    """

    def __init__(self, weight: Tensor, slot_of: Ints, wait: Callable[[int], None]) -> None:
        self._weight, self._slot_of, self._wait = weight, slot_of, wait

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        number = int(expert)
        self._wait(number)
        return self._weight[self._slot_of[number]]


class _Groups:
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
        return self._weight[_mapped(groups, self._wave.slots)]

    def transpose(self, first: int, second: int) -> "_Groups":
        """Return the transposed parameter."""
        return _Groups(self._weight.transpose(first, second), self._wave, self._order, self._wait)

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
        groups, results = rows.split_with_sizes(sizes), output.split_with_sizes(sizes)
        for group in self._order:
            self._wait([experts[group]])
            slot = slots[group]
            if rows.device.type == "cpu":  # where grouped_mm calls mm for each group, too
                torch.mm(groups[group], self._weight[slot], out=results[group])
            else:
                end = ends[group : group + 1] - bounds[group]
                results[group].copy_(grouped_mm(groups[group], self._weight[slot : slot + 1], offs=end))
        return output


def _eager(module: Any, hidden_states: Tensor, index: Tensor, gate_weights: Tensor) -> Tensor:
    """Call the forward of an experts class that the registry would replace."""
    kind = type(module.__dict__.get("_module", module))
    return kind.forward.__wrapped__(module, hidden_states, index, gate_weights)  # type: ignore[no-any-return]


_NATIVE: dict[str, Callable[..., Tensor]] = {
    name: _eager if name == "eager" else ALL_EXPERTS_FUNCTIONS[name] for name in IMPLEMENTATIONS
}


def refuse_compilation() -> None:
    """Refuse to be traced by ``torch.compile``, whose graph would keep the experts of the first call.

    Raises:
        UserError: The caller is being compiled.
    """
    if torch.compiler.is_compiling():
        _raise_compiled()


@torch.compiler.disable(reason=COMPILED)  # type: ignore[no-untyped-call,untyped-decorator]
def _raise_compiled() -> None:
    """Raise outside the graph: the tracer would replace the error by one of its own."""
    raise UserError(COMPILED)


def _dispatcher(kernel: str, other: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function for the registry that computes in slots if the module has any, and otherwise calls another."""

    def compute(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        slots: SlotKernel | None = self.__dict__.get(ATTRIBUTE)
        if slots is None:
            return other(self, hidden_states, top_k_index, top_k_weights)
        refuse_compilation()
        return slots.compute(kernel, hidden_states, top_k_index, top_k_weights)

    return compute


_users = 0
_replaced: dict[str, Callable[..., Tensor] | None] = {}
_lock = threading.Lock()


@contextmanager
def slot_kernels() -> Iterator[None]:
    """Serve modules with slots while at least one block of this function runs; then restore the registry."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for kernel in IMPLEMENTATIONS:
                _replaced[kernel] = replaced = ALL_EXPERTS_FUNCTIONS.get(kernel)
                ALL_EXPERTS_FUNCTIONS[kernel] = _dispatcher(kernel, replaced or _NATIVE[kernel])
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for kernel, replaced in _replaced.items():
                    ALL_EXPERTS_FUNCTIONS.pop(kernel)
                    if ALL_EXPERTS_FUNCTIONS.get(kernel) is not replaced:  # a user's own, which hid that of the package
                        ALL_EXPERTS_FUNCTIONS[kernel] = replaced
