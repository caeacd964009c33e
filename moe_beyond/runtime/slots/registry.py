"""transformers' experts registry, in which modules with slots get kernels of their own.

transformers looks up the function that computes a layer's experts by the name of a kernel. Here the three names that
run on every device get a function that serves the layers of offloaded models and passes all other modules on. So
transformers' own switch between kernels, from prefill to decode on a GPU, works unchanged.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_beyond.errors import UserError
from moe_beyond.runtime.experts import IMPLEMENTATIONS

COMPILED = (
    "an offloaded model cannot be compiled, because its experts leave their slots; call it without torch.compile, or "
    "pass disable_compile=True to generate"
)
"""Refusal of ``torch.compile``; `generate` compiles models with static caches on a GPU."""
ATTRIBUTE = "_moe_beyond_slots"
"""Attribute of an experts module that holds its `Kernel`."""


class Kernel(Protocol):
    """Value of the attribute `ATTRIBUTE`: computes the experts of its module in slots."""

    def compute(self, kernel: str, hidden_states: Tensor, index: Tensor, gate_weights: Tensor) -> Tensor:
        """Compute the experts of the layer, as the kernel of this name does."""


def eager(module: Any, hidden_states: Tensor, index: Tensor, gate_weights: Tensor) -> Tensor:
    """Call the forward of an experts class that the registry would replace."""
    kind = type(module.__dict__.get("_module", module))
    return kind.forward.__wrapped__(module, hidden_states, index, gate_weights)  # type: ignore[no-any-return]


NATIVE: dict[str, Callable[..., Tensor]] = {
    name: eager if name == "eager" else ALL_EXPERTS_FUNCTIONS[name] for name in IMPLEMENTATIONS
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
        slots: Kernel | None = self.__dict__.get(ATTRIBUTE)
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
                ALL_EXPERTS_FUNCTIONS[kernel] = _dispatcher(kernel, replaced or NATIVE[kernel])
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
