"""What routers make of their logits before a selection bias is added, by the names that configurations use."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

ROUTER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
}
