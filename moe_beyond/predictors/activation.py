"""Activations: functions from the logits of a layer's experts to their probabilities of being selected."""

import math
from typing import Literal

import torch
from torch import Tensor

from moe_beyond.predictors.numba_activation import CERTAIN_LOGIT, MAX_STEPS, STEP_TOLERANCE

Activation = Literal["sigmoid", "softmax", "subset"]
"""``"sigmoid"``: each expert independently. ``"softmax"``: K times the softmax over a layer's experts, at most 1. (At
the optimum of the K-positive cross-entropy, the softmax is 1/K of each expert's probability.) ``"subset"``: the sigmoid
of logits that are shifted so that the probabilities of a layer add up to K. If tokens may use fewer than K experts,
only ``"sigmoid"`` is valid."""

STEPS_PER_CHECK = 4


def apply_activation(logits: Tensor, activation: Activation, top_k: int) -> Tensor:
    """Return the probabilities ``(..., E)`` of being selected.

    Args:
        logits: Logits ``(..., E)`` of the experts of a layer.
        activation: Name of the activation.
        top_k: Experts per token and layer, K.
    """
    if activation == "sigmoid":
        return logits.sigmoid()
    if activation == "subset":
        return (logits - subset_shift(logits, top_k)).sigmoid()
    return (logits.softmax(-1) * top_k).clamp(max=1.0)


@torch.no_grad()
def subset_shift(logits: Tensor, top_k: int) -> Tensor:
    """Return the shift ``(..., 1)`` for which the sum of sigmoid(logit - shift) over a layer's experts is K.

    Args:
        logits: Logits ``(..., E)`` of the experts of a layer.
        top_k: Experts per token and layer, K.
    """
    lowest, highest = logits.min(-1, keepdim=True).values, logits.max(-1, keepdim=True).values
    if logits.shape[-1] == top_k:
        return lowest - CERTAIN_LOGIT  # all experts are selected
    odds = math.log(top_k / (logits.shape[-1] - top_k))
    low, high = lowest - odds, highest - odds  # the shifts if all logits were the lowest, or the highest
    shift = torch.minimum(logits.logsumexp(-1, keepdim=True) - math.log(top_k), high)
    for _ in range(0, MAX_STEPS, STEPS_PER_CHECK):
        shift, low, high, step = _newton_steps(logits, shift, low, high, top_k)
        if step < STEP_TOLERANCE:
            break
    return shift


def _newton_steps(logits: Tensor, shift: Tensor, low: Tensor, high: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Make a few Newton steps; return the shift, its lower and upper bound, and the size of the last step.

    The steps are made on the logarithm of the sum, which is nearly linear in the shift.
    """
    step = shift.new_zeros(())
    for _ in range(STEPS_PER_CHECK):
        probability = (logits - shift).sigmoid()
        total = probability.sum(-1, keepdim=True)
        low, high = torch.where(total > top_k, shift, low), torch.where(total > top_k, high, shift)
        slope = (probability * (1 - probability)).sum(-1, keepdim=True) / total
        proposal = shift + (total / top_k).log() / slope.clamp(min=1e-12)
        # Outside the bounds, halve the interval instead.
        proposal = torch.where((proposal >= low) & (proposal <= high), proposal, (low + high) / 2)
        step, shift = (proposal - shift).abs().max(), proposal
    return shift, low, high, step
