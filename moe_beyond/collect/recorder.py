"""Recording a model's routing with one hook on each experts module, whatever the architecture.

In transformers 5 the experts of nearly every mixture are a module whose forward takes the hidden states, the chosen
experts and their weights, so that modules are found by their signature and what is recorded is what the experts
received: the router's logits would miss selection biases and groups.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_beyond.errors import UserError

# The second and third parameter of an experts module's forward; two spellings are in use.
SIGNATURES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.")


class Recorder:
    """What the hooked modules received since the last `take`; made by `recording`.

    Attributes:
        moe_layers: Indices of the model's layers that hold experts, ascending.
    """

    def __init__(self, moe_layers: tuple[int, ...]) -> None:
        self.moe_layers = moe_layers
        self._experts: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._weights: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}

    def _receive(self, layer: int, experts: Tensor, weights: Tensor) -> None:
        self._experts[layer].append(experts.detach().cpu())
        self._weights[layer].append(weights.detach().float().cpu())

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return and forget what was recorded.

        Returns:
            Expert ids and router weights, both ``(N, L, K)``, in the router's order; N counts tokens over all calls.
        """
        experts = torch.stack([torch.cat(self._experts[layer]) for layer in self.moe_layers], 1)
        weights = torch.stack([torch.cat(self._weights[layer]) for layer in self.moe_layers], 1)
        for calls in (*self._experts.values(), *self._weights.values()):
            calls.clear()
        return experts.numpy().astype(np.int64), weights.numpy()


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """Record a model's routing while the block runs.

    Args:
        model: A transformers mixture of experts.

    Raises:
        UserError: No module of the model takes chosen experts.
    """
    found: dict[int, tuple[nn.Module, tuple[str, str]]] = {}
    for name, module in model.named_modules():
        names = tuple(inspect.signature(type(module).forward).parameters)[2:4]
        if names in SIGNATURES and (layer := LAYER.search(f"{name}.")):
            found[int(layer[1])] = (module, names)
    if not found:
        raise UserError(f"{type(model).__name__}: no experts module found; is it a mixture of experts?")
    recorder = Recorder(tuple(sorted(found)))
    handles = [
        module.register_forward_pre_hook(_hook(recorder, layer, names), with_kwargs=True)
        for layer, (module, names) in found.items()
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _hook(recorder: Recorder, layer: int, names: tuple[str, str]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received = dict(zip(("hidden_states", *names), args, strict=False)) | kwargs
        recorder._receive(layer, received[names[0]], received[names[1]])  # noqa: SLF001

    return hook
