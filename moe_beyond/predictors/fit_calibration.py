"""Fitting a calibration on held-out sequences."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.calibration import Calibration

MAX_TOKENS = 8192  # sampled at random from all tokens, so that texts of every length contribute
TOKENS_AT_ONCE = 512  # tokens whose activations are in memory at once
MAX_STEPS = 50
MIN_PROBABILITY = 1e-6
MAX_LOG_SCALE = 3.0  # bound on log(scale), so that an uninformative predictor keeps its order after rounding


def calibrate(predictor: Predictor, batches: Iterable[Batch], tokens: int) -> Calibration:
    """Fit a calibration by maximum likelihood on sequences that the predictor was not fitted on.

    Args:
        predictor: Predictor in evaluation mode; its own calibration is ignored.
        batches: Held-out sequences, of any length; one batch is in memory at a time.
        tokens: Number of their tokens.

    Raises:
        UserError: There are no held-out sequences.
    """
    if tokens == 0:
        raise UserError("calibration: there are no held-out sequences; add a validation split")
    logits, targets = [], []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for batch in batches:
            real = predictor(batch)[batch.mask].float().cpu()
            sample = torch.rand(len(real), generator=generator) * tokens < MAX_TOKENS
            logits.append(real[sample])
            targets.append(batch.targets(predictor.geometry.num_experts)[batch.mask].cpu()[sample])
    x, y = torch.cat(logits), torch.cat(targets)
    fits = [_fit(predictor, x[:, lookahead], y.to(x.dtype)) for lookahead in range(x.shape[1])]
    scales, shifts = zip(*fits, strict=True)
    return Calibration(torch.stack(scales), torch.stack(shifts))


def _fit(predictor: Predictor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales ``(L,)`` and shifts ``(L,)`` of one lookahead.

    Args:
        predictor: Predictor whose activation is used.
        logits: Logits ``(N, L, E)``.
        targets: 1 for selected experts and 0 for others, ``(N, L, E)``.
    """
    log_scale, shift = (nn.Parameter(logits.new_zeros(logits.shape[1])) for _ in range(2))
    parameters = [log_scale, shift] if predictor.activation == "sigmoid" else [log_scale]
    optimizer = torch.optim.LBFGS(parameters, max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = logits.new_zeros(())
        for begin in range(0, len(logits), TOKENS_AT_ONCE):
            some = slice(begin, begin + TOKENS_AT_ONCE)
            calibrated = logits[some] * _scale(log_scale)[:, None] + shift[:, None]
            p = predictor.apply_activation(calibrated).clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
            entropy = nn.functional.binary_cross_entropy(p, targets[some], reduction="sum")
            value = entropy * logits.shape[-1] / logits.numel()
            value.backward()  # type: ignore[no-untyped-call]
            total += value.detach()
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return _scale(log_scale).detach(), shift.detach()


def _scale(log_scale: Tensor) -> Tensor:
    """Return the scale, within bounds that are approached smoothly."""
    return (MAX_LOG_SCALE * (log_scale / MAX_LOG_SCALE).tanh()).exp()
