"""Objectives for choosing K experts out of E, and the probabilities that go with them."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.modules.window_attention import NEVER
from moe_beyond.predictors.numba_activation import MOST_STEPS, SMALL_STEP, SURELY

STEPS_AT_ONCE = 4


def targets_or(logits: Tensor, batch: Batch, soft_targets: Tensor | None) -> Tensor:
    """Return what logits ``(B, T, H, L, E)`` are fitted to: ``(N, H, L, E)`` of the N real tokens, as numbers.

    Args:
        logits: The logits.
        batch: What was chosen.
        soft_targets: Of the logits' shape, what to fit in its place: probabilities.
    """
    real = batch.mask
    chosen = batch.targets(logits.shape[-1])[real][:, None] if soft_targets is None else soft_targets[real]
    return chosen.expand(-1, *logits.shape[2:]).to(torch.float32)


def k_positive_cross_entropy(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of a softmax over experts against 1/K on each of K chosen ones, in nats.

    At its optimum the softmax is 1/K of each expert's probability of being chosen.

    Args:
        logits: ``(B, T, H, L, E)``.
        batch: What was chosen.
        soft_targets: Of the logits' shape, what to fit in place of the choices: probabilities that add up to K.

    Returns:
        A scalar, the mean over what real tokens chose, and over lookaheads.
    """
    real = batch.mask
    logs = logits[real].float().log_softmax(-1)
    if soft_targets is not None:
        return -(logs * soft_targets[real]).sum(-1).mean() / batch.experts.shape[-1]
    chosen = batch.ids(logs.shape[-1])[real][:, None].expand(-1, logs.shape[1], -1, -1)
    there = chosen < logs.shape[-1]
    return -(logs.gather(-1, chosen.where(there, 0)) * there).sum() / there.sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of each expert being chosen, as if none knew of the others, in nats a layer.

    Args:
        logits: ``(B, T, H, L, E)``, log-odds.
        batch: What was chosen.
        soft_targets: Of the logits' shape, what to fit in place of the choices: probabilities.

    Returns:
        A scalar, the mean over real tokens, layers and lookaheads.
    """
    found = logits[batch.mask].float()
    return (
        functional.binary_cross_entropy_with_logits(found, targets_or(logits, batch, soft_targets)) * logits.shape[-1]
    )


def ranking_loss(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """How far chosen experts are from being above all others: log(1 + sum over pairs of exp(other - chosen)).

    The log-sum-exp pairwise loss of Li, Song and Luo (2017, arXiv 1704.03135).

    Args:
        logits: ``(B, T, H, L, E)``; only their differences within a layer count.
        batch: What was chosen.
        soft_targets: Not for a ranking: there is no order among probabilities to be fitted.

    Returns:
        A scalar, the mean over real tokens, layers and lookaheads.

    Raises:
        UserError: Something is soft_targets.
    """
    if soft_targets is not None:
        raise UserError("objective ranking fits an order, not probabilities; give it no teachers")
    found, chosen = logits[batch.mask].float(), targets_or(logits, batch, None) > 0
    others = found.masked_fill(chosen, NEVER).logsumexp(-1)
    return functional.softplus(others + (-found).masked_fill(~chosen, NEVER).logsumexp(-1)).mean()


def subset_cross_entropy(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of each expert being chosen, given that K are, in nats an entry.

    An expert is chosen with probability sigmoid(logit - shift), and the shift makes those of a layer add up to K. Its
    gradient, probability minus choice, is that of the likelihood of the chosen set where any K experts weigh exp(sum of
    logits) (conditional Bernoulli sampling; Chen, Dempster and Liu 1994), with the inclusion probabilities of large E:
    so the shift itself is held fixed.

    Args:
        logits: ``(B, T, H, L, E)``.
        batch: What was chosen.
        soft_targets: Of the logits' shape, what to fit in place of the choices: probabilities that add up to K.

    Returns:
        A scalar, the mean over real tokens, layers and lookaheads.
    """
    found = logits[batch.mask].float()
    shift = subset_shift(found, batch.experts.shape[-1])
    return _each_expert(found, shift, targets_or(logits, batch, soft_targets)) * logits.shape[-1]


def _each_expert(logits: Tensor, shift: Tensor, soft_targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits - shift, soft_targets)


@torch.no_grad()
def subset_shift(logits: Tensor, top_k: int) -> Tensor:
    """Return the shift ``(..., 1)`` by which sigmoid(logit - shift) adds up to K, of logits ``(..., E)``."""
    lowest, highest = logits.min(-1, keepdim=True).values, logits.max(-1, keepdim=True).values
    if logits.shape[-1] == top_k:
        return lowest - SURELY  # all are chosen
    odds = math.log(top_k / (logits.shape[-1] - top_k))
    low, high = lowest - odds, highest - odds  # were all logits the lowest, or the highest
    shift = torch.minimum(logits.logsumexp(-1, keepdim=True) - math.log(top_k), high)
    for _ in range(0, MOST_STEPS, STEPS_AT_ONCE):
        shift, low, high, step = _newton_step(logits, shift, low, high, top_k)
        if step < SMALL_STEP:
            break
    return shift


def _newton_step(logits: Tensor, shift: Tensor, low: Tensor, high: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Come closer by some steps of Newton's; return the shift, what it lies between, and the last step's size."""
    step = shift.new_zeros(())
    for _ in range(STEPS_AT_ONCE):  # on the logarithm of the sum, which is nearly linear in the shift
        chosen = (logits - shift).sigmoid()
        total = chosen.sum(-1, keepdim=True)
        low, high = torch.where(total > top_k, shift, low), torch.where(total > top_k, high, shift)
        slope = (chosen * (1 - chosen)).sum(-1, keepdim=True) / total
        found = shift + (total / top_k).log() / slope.clamp(min=1e-12)
        found = torch.where((found >= low) & (found <= high), found, (low + high) / 2)  # or halve where it must be
        step, shift = (found - shift).abs().max(), found
    return shift, low, high, step
