"""AdamW with a linear warm-up and a cosine decay to zero."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of the optimiser.

    Attributes:
        lr: Peak learning rate, above 0.
        weight_decay: Weight decay of matrices, at least 0; biases and norms have none.
        warmup: Share of all optimiser steps until the peak learning rate, in [0, 1].
    """

    lr: float = 1e-3
    weight_decay: float = 0.03
    warmup: float = 0.05

    def to_json(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)

    def build(self, parameters: Iterable[nn.Parameter], steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Return the optimiser and its schedule, which is stepped at every optimiser step.

        Args:
            parameters: Weights to fit.
            steps: Number of optimiser steps of the whole fit.
        """
        weights = list(parameters)
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, self.lr)
        rising = max(1, round(self.warmup * steps))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

        return optimizer, LambdaLR(optimizer, factor)
