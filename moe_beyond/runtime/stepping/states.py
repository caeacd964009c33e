"""The hidden states of single tokens, for predictors that read them while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moe_beyond.collect.recorder import LARGEST
from moe_beyond.runtime.experts import ExpertsLayer

if TYPE_CHECKING:
    from moe_beyond.predictors.information import StateKind

Half = npt.NDArray[np.float16]


def state_modules(
    layers: Mapping[int, ExpertsLayer], kind: "StateKind", router_inputs: Mapping[int, nn.Module]
) -> dict[int, nn.Module]:
    """Return the modules whose first argument is a hidden state that a predictor reads.

    Args:
        layers: Experts by position among the MoE layers.
        kind: Kind of hidden states in the predictor's information set.
        router_inputs: Module by index of the model's layer, whose first argument is the input of the layer's router;
            for other layers the input of the experts is taken, as a recording does.

    Returns:
        Position among the MoE layers -> module.
    """
    if kind == "layer_inputs":
        return {position: experts.target.layer for position, experts in layers.items()}
    return {position: router_inputs.get(experts.layer, experts.module) for position, experts in layers.items()}


def watch_states(modules: Mapping[int, nn.Module], see: Callable[[int, Half], None]) -> Iterator[Any]:
    """Hook modules, so that the states of forwards with one token are seen in half precision, as a recording has them.

    Args:
        modules: Position among the MoE layers -> module.
        see: Function of the position and the state, ``(D,)``.

    Yields:
        Handles of the hooks.
    """

    def before(position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else next(iter(kwargs.values()))
        if state.numel() == state.shape[-1]:
            half = state.detach().to("cpu", torch.float16, copy=True).view(-1)
            see(position, half.clamp_(-LARGEST, LARGEST).numpy())

    for position, module in modules.items():
        yield module.register_forward_pre_hook(partial(before, position), with_kwargs=True)
