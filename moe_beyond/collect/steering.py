"""Forcing experts on or off in the routers of a model, in prefill and decode.

The method is SteerMoE's (arXiv 2509.09660). Before the choice, an expert that is on gets a score just above the largest
score of the token, and an expert that is off gets one just below the smallest. The model then computes its weight as
usual. Scores do not decide the choice if a bias is added for it, if groups limit it, or if rounding makes scores equal.
Therefore the router's `topk` also ranks experts that are on first and experts that are off last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_beyond.collect.recorder import find_experts, recording
from moe_beyond.collect.router_probe import (
    TOPK_FUNCTIONS,
    MoEBlock,
    Router,
    find_routers,
    matmul_operands,
    run_inside,
    run_probe,
    same_weight,
)
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.steering import Steering

MARGIN = 0.01
"""Distance from the largest or smallest logit; SteerMoE's value."""


class SteeringMode(TorchFunctionMode):
    """Changes the logits of a router and the choice among them, within the forward of its block.

    Args:
        router: Router of the block.
        on: Experts that every token uses.
        off: Experts that no token uses.
    """

    def __init__(self, router: Router, on: list[int], off: list[int]) -> None:
        super().__init__()
        self._router, self._choices = router, len(router.weight)
        self._on, self._off = (
            torch.tensor(experts, dtype=torch.int64, device=router.weight.device) for experts in (on, off)
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call through, except the router's product and a choice among as many scores."""
        kwargs = kwargs or {}
        operands = matmul_operands(func, args, kwargs)
        if operands is not None and same_weight(operands[1], self._router.weight):
            return self.steer_logits(func(*args, **kwargs))
        if func in TOPK_FUNCTIONS and (scores := args[0]).shape[-1] == self._choices:
            indices = func(self.steer_order(scores), *args[1:], **kwargs).indices
            return torch.return_types.topk((scores.gather(-1, indices), indices))
        return func(*args, **kwargs)

    def steer_logits(self, logits: Tensor) -> Tensor:
        """Move the logits of steered experts beyond all other logits of the token.

        Args:
            logits: ``(..., C)`` or wider; columns after the choices stay as they are.
        """
        choices = logits[..., : self._choices]
        step = choices.abs().amax(-1, keepdim=True).mul(2 * torch.finfo(logits.dtype).eps).clamp_min(MARGIN)
        highest, lowest = choices.amax(-1, keepdim=True) + step, choices.amin(-1, keepdim=True) - step
        logits = logits.index_copy(-1, self._on, highest.expand(*logits.shape[:-1], len(self._on)))
        return logits.index_copy(-1, self._off, lowest.expand(*logits.shape[:-1], len(self._off)))

    def steer_order(self, scores: Tensor) -> Tensor:
        """Return scores that rank experts that are on first, and experts that are off last, after excluded groups.

        Args:
            scores: Scores of the choices, ``(..., C)``.
        """
        finite = torch.finfo(scores.dtype)
        ordered = scores.nan_to_num(nan=finite.min, posinf=finite.max, neginf=finite.min)
        ordered = ordered.index_fill(-1, self._on, torch.inf)
        return ordered.index_fill(-1, self._off, -torch.inf)


@contextmanager
def steered(model: Any, steering: Steering, geometry: Geometry) -> Iterator[None]:
    """Force experts on or off in everything that a model computes while the block runs.

    Args:
        model: MoE model of transformers, on any device.
        steering: Experts that are forced on or off.
        geometry: Geometry of the model.

    Raises:
        UserError: The model lacks one of these experts, or its choice for a few random tokens does not obey.
    """
    steering.check_fits(geometry)
    targets, routers = find_experts(model), find_routers(model)
    handles: list[Any] = []
    try:
        for layer in steering.layers:
            if layer not in routers:
                raise UserError(
                    f"--steer: layer {layer} of {geometry.model} cannot be steered: no scores explain its choice of "
                    "experts (hash routing has none, an adapter on the router hides them); steer other layers"
                )
            mode = SteeringMode(routers[layer], *steering.of_layer(layer))
            handles += run_inside(MoEBlock.of(model, targets[layer]).module, mode)
        with recording(model) as recorder:
            run_probe(model)
            steering.check_obeyed(recorder.pop_concatenated()[0], geometry)
        yield
    finally:
        for handle in handles:
            handle.remove()
