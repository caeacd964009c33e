"""Forcing experts on or off in the routers of a model, while it reads and writes.

As SteerMoE does (arXiv 2509.09660): before the choice, an expert that is on gets a score just above the largest of the
token's, and one that is off just below the smallest, so that its weight follows as the model computes it. That alone
does not decide where a bias is added for the choice, where groups limit it, or where rounding makes two scores one:
in the router's `topk` what is on comes before all, and what is off after all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_beyond.collect.recorder import find_experts, recording
from moe_beyond.collect.router_probe import (
    CHOICES,
    MoEBlock,
    Router,
    find_routers,
    product_of,
    read_probe,
    same_weight,
    within,
)
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.steering import Steering

MARGIN = 0.01
"""How far above the largest logit, or below the smallest; SteerMoE's."""


class SteeringMode(TorchFunctionMode):
    """Changes what a mixture's forward computes: the logits of a router, and what is chosen by them.

    Args:
        router: The mixture's.
        on: Experts that are chosen for every token.
        off: Experts that are chosen for none.
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
        """Let a call be, but for the router's product and a choice among as many."""
        kwargs = kwargs or {}
        if (product := product_of(func, args, kwargs)) is not None and same_weight(product[1], self._router.weight):
            return self.logits(func(*args, **kwargs))
        if func in CHOICES and (scores := args[0]).shape[-1] == self._choices:
            indices = func(self.order(scores), *args[1:], **kwargs).indices
            return torch.return_types.topk((scores.gather(-1, indices), indices))
        return func(*args, **kwargs)

    def logits(self, logits: Tensor) -> Tensor:
        """Put the logits of what is forced beyond all others of the token; there may be more than the choices have."""
        among = logits[..., : self._choices]
        step = among.abs().amax(-1, keepdim=True).mul(2 * torch.finfo(logits.dtype).eps).clamp_min(MARGIN)
        highest, lowest = among.amax(-1, keepdim=True) + step, among.amin(-1, keepdim=True) - step
        logits = logits.index_copy(-1, self._on, highest.expand(*logits.shape[:-1], len(self._on)))
        return logits.index_copy(-1, self._off, lowest.expand(*logits.shape[:-1], len(self._off)))

    def order(self, scores: Tensor) -> Tensor:
        """Return scores in whose order what is on is first, and what is off last, behind groups that are not kept."""
        finite = torch.finfo(scores.dtype)
        ordered = scores.nan_to_num(nan=finite.min, posinf=finite.max, neginf=finite.min)
        ordered = ordered.index_fill(-1, self._on, torch.inf)
        return ordered.index_fill(-1, self._off, -torch.inf)


@contextmanager
def steered(model: Any, steering: Steering, geometry: Geometry) -> Iterator[None]:
    """Force experts on or off in all that a model computes while the block runs.

    Args:
        model: A transformers mixture of experts, on any device.
        steering: Which.
        geometry: The model's.

    Raises:
        UserError: The model has no such expert, or a few random tokens show that its choice does not obey.
    """
    steering.check_fits(geometry)
    mixtures, routers = find_experts(model), find_routers(model)
    handles: list[Any] = []
    try:
        for layer in steering.layers:
            if layer not in routers:
                raise UserError(
                    f"--steer: layer {layer} of {geometry.model}: no scores of what it reads were found that choose "
                    "its experts (hash routing has none, an adapter on the router hides them); it cannot be steered"
                )
            forced = SteeringMode(routers[layer], *steering.of_layer(layer))
            handles += within(MoEBlock.of(model, mixtures[layer]).block, forced)
        with recording(model) as recorder:
            read_probe(model)
            steering.check_obeyed(recorder.pop_concatenated()[0], geometry)
        yield
    finally:
        for handle in handles:
            handle.remove()
