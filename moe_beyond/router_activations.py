"""Activations of routers: functions from a router's logits to the values that a selection bias is added to."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

ROUTER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
}
"""Name, as model configurations use it -> function of logits ``(..., E)``."""
