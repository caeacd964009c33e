"""Sums of fractions in integers, which are the same for any order and any number of ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moe_beyond.errors import UserError

ONE = 2**24
"""Integer for 1. A sum of 64 bits has room for 5e11."""


def fixed(values: Tensor) -> Tensor:
    """Return fractions as multiples of 1 / `ONE`, int64; single precision has no finer ones above 1."""
    return (values * ONE).round().long()


def check_finite(values: Tensor) -> None:
    """Refuse scores or losses that are not finite, which no integer represents.

    Raises:
        UserError: A value is not finite.
    """
    if not values.isfinite().all():
        raise UserError(
            "scores are not all finite: the predictor has diverged; fit it again with a lower learning rate"
        )


class ExactMean(Metric):
    """Mean of values with whole weights.

    Example:
        >>> import torch
        >>> mean = ExactMean()
        >>> mean.update(torch.tensor(0.5), 3)
        >>> mean.update(torch.tensor(1.0), 1)
        >>> float(mean.compute())
        0.625
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: int) -> None:
        """Add a value.

        Args:
            value: Value, a scalar.
            weight: Weight of the value.
        """
        check_finite(value)
        self.total += fixed(value.detach().double() * weight)
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean, float64; NaN before any update."""
        return self.total.double() / (self.weight.double() * ONE)

    def mean(self, *, over_ranks: bool = False) -> float:
        """Return the mean.

        Args:
            over_ranks: Whether to add the sums of all ranks, which all must call this (default: False).
        """
        with self.sync_context(should_sync=over_ranks, should_unsync=over_ranks):
            return float(self.total.double() / (self.weight.double() * ONE))
