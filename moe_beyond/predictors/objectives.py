"""Objectives for selecting K experts out of E, and the activation that belongs to each."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.predictors.activation import Activation, subset_shift
from moe_beyond.predictors.batch import Batch


def targets_or(logits: Tensor, batch: Batch, soft_targets: Tensor | None) -> Tensor:
    """Return the float32 targets ``(N, H, L, E)`` of the N real tokens: the soft targets, or else the selected experts.

    Args:
        logits: Logits ``(B, T, H, L, E)``.
        batch: Batch with the selected experts.
        soft_targets: Probabilities of the logits' shape that replace the selected experts; None: the selected experts.
    """
    real = batch.mask
    targets = batch.targets(logits.shape[-1])[real][:, None] if soft_targets is None else soft_targets[real]
    return targets.expand(-1, *logits.shape[2:]).float()


def k_positive_cross_entropy(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of a softmax over experts against 1/K on each of K selected experts, in nats.

    At its optimum the softmax is 1/K of each expert's probability of being selected.

    Args:
        logits: Logits ``(B, T, H, L, E)``.
        batch: Batch with the selected experts.
        soft_targets: Probabilities of the logits' shape, adding up to K, that replace the selected experts (default:
            None).

    Returns:
        A scalar: the mean over the selected experts of real tokens, and over lookaheads.
    """
    real = batch.mask
    log_shares = logits[real].float().log_softmax(-1)
    if soft_targets is not None:
        return -(log_shares * soft_targets[real]).sum(-1).mean() / batch.experts.shape[-1]
    selected = batch.ids(log_shares.shape[-1])[real][:, None].expand(-1, log_shares.shape[1], -1, -1)
    exists = selected < log_shares.shape[-1]
    return -(log_shares.gather(-1, selected.where(exists, 0)) * exists).sum() / exists.sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each expert's selection, treated as independent, in nats per layer.

    Args:
        logits: Log-odds ``(B, T, H, L, E)``.
        batch: Batch with the selected experts.
        soft_targets: Probabilities of the logits' shape that replace the selected experts (default: None).

    Returns:
        A scalar: the mean over real tokens, layers and lookaheads.
    """
    targets = targets_or(logits, batch, soft_targets)
    return functional.binary_cross_entropy_with_logits(logits[batch.mask].float(), targets) * logits.shape[-1]


def ranking_loss(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Return log(1 + sum over pairs of exp(other - selected)).

    It is small if the selected experts rank above all others. This is the log-sum-exp pairwise loss of Li, Song and Luo
    (2017, arXiv 1704.03135).

    Args:
        logits: Logits ``(B, T, H, L, E)``; only their differences within a layer matter.
        batch: Batch with the selected experts.
        soft_targets: Must be None: probabilities define no order to fit.

    Returns:
        A scalar: the mean over real tokens, layers and lookaheads.

    Raises:
        UserError: There are soft targets.
    """
    if soft_targets is not None:
        raise UserError("objective ranking: fits an order and takes no probabilities; remove the teachers")
    scores, selected = logits[batch.mask].float(), targets_or(logits, batch, None) > 0
    others = scores.masked_fill(selected, -math.inf).logsumexp(-1)
    return functional.softplus(others + (-scores).masked_fill(~selected, -math.inf).logsumexp(-1)).mean()


def subset_cross_entropy(logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each expert's selection, given that K are selected, in nats per layer.

    An expert is selected with probability sigmoid(logit - shift); the shift makes the probabilities of a layer add up
    to K. The gradient is probability minus selection. It equals the gradient of the likelihood of the selected set if
    any K experts weigh exp(sum of logits) (conditional Bernoulli sampling; Chen, Dempster and Liu 1994), with the
    inclusion probabilities of large E. Therefore the shift is held fixed in the gradient.

    Args:
        logits: Logits ``(B, T, H, L, E)``.
        batch: Batch with the selected experts.
        soft_targets: Probabilities of the logits' shape, adding up to K, that replace the selected experts (default:
            None).

    Returns:
        A scalar: the mean over real tokens, layers and lookaheads.
    """
    real = logits[batch.mask].float()
    shift = subset_shift(real, batch.experts.shape[-1])
    return _shifted_cross_entropy(real, shift, targets_or(logits, batch, soft_targets)) * logits.shape[-1]


def _shifted_cross_entropy(logits: Tensor, shift: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits - shift, targets)


OBJECTIVES: dict[str, tuple[Callable[[Tensor, Batch, Tensor | None], Tensor], Activation]] = {
    "softmax": (k_positive_cross_entropy, "softmax"),
    "subset": (subset_cross_entropy, "subset"),
    "sigmoid": (binary_cross_entropy, "sigmoid"),
    "ranking": (ranking_loss, "subset"),
}
"""Objective -> loss, and activation that turns the fitted logits into probabilities."""
