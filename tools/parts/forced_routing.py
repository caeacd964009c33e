"""Forcing the routing of a trace set on a model of the DeepSeek-V2 architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moe_beyond.collect.router_probe import TOPK_FUNCTIONS, run_inside


class ForcedChoice(TorchFunctionMode):
    """Replaces a router's choice by the recorded one.

    Args:
        layer: Position among the MoE layers.

    Attributes:
        experts: Choice for the N tokens that the model computes next, ``(N, L, K)`` int64.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer
        self.experts: Tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call through, except the choice."""
        if func not in TOPK_FUNCTIONS:
            return func(*args, **(kwargs or {}))
        experts = self.experts[:, self._layer]
        return torch.return_types.topk((args[0].gather(-1, experts), experts))


@contextmanager
def forced_routing(model: PreTrainedModel) -> Iterator[Callable[[Tensor], None]]:
    """Force the routing of a model while the block runs.

    Args:
        model: Model of the DeepSeek-V2 architecture.

    Yields:
        Function that receives the experts of the next tokens, ``(N, L, K)`` int64.
    """
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    choices = [ForcedChoice(layer) for layer in range(len(gates))]
    handles = [handle for gate, choice in zip(gates, choices, strict=True) for handle in run_inside(gate, choice)]

    def force(experts: Tensor) -> None:
        for choice in choices:
            choice.experts = experts

    try:
        yield force
    finally:
        for handle in handles:
            handle.remove()
