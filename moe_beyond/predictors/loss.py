"""Objectives for choosing K experts out of E."""

from torch import Tensor

from moe_beyond.predictors.batch import Batch


def k_positive_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of a softmax over experts against 1/K on each chosen one, in nats.

    At its optimum the softmax is 1/K of each expert's probability of being chosen.

    Args:
        logits: ``(B, T, H, L, E)``.
        batch: What was chosen.

    Returns:
        A scalar, the mean over real tokens, layers and lookaheads.
    """
    real = batch.mask
    logs = logits[real].log_softmax(-1)
    chosen = batch.experts[real].long()[:, None].expand(-1, logs.shape[1], -1, -1)
    return -logs.gather(-1, chosen).mean()
