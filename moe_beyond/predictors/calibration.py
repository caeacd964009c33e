"""Calibration: logits stretched and shifted so that probabilities are met as often as they say.

One scale and one shift for every lookahead and layer (Platt 1999; Guo et al. 2017, arXiv 1706.04599): logits become
scale * logit + shift before the predictor's link turns them into probabilities. The order of a layer's experts stays
(scale is above 0), and so does recall. Where the link is a softmax or a subset, a shift changes nothing.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import Batch

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor

TOKENS = 8192  # that it is fitted on: a random part of all, so that no length of text is left out
STEPS = 50
SURE = 1e-6
MOST_STRETCH = 3.0  # of the scale's logarithm: a predictor that knows nothing shall not lose its order to rounding


class Calibration:
    """Scales and shifts.

    Attributes:
        scale: ``(H, L)``, above 0.
        shift: ``(H, L)``.
        arrays: Both, for steppers.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale.float().cpu(), shift.float().cpu()
        self.arrays = self.scale.numpy(), self.shift.numpy()

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrate logits ``(..., H, L, E)``."""
        scale, shift = (x.to(logits.device)[..., None] for x in (self.scale, self.shift))
        return logits * scale + shift

    def to_json(self) -> dict[str, list[list[float]]]:
        """Return plain lists, ``H`` of ``L`` each."""
        return {"scale": self.scale.tolist(), "shift": self.shift.tolist()}

    @staticmethod
    def from_json(found: Any, shape: tuple[int, int], source: str) -> "Calibration":
        """Read what `to_json` made.

        Args:
            found: Of a predictor's configuration.
            shape: ``(H, L)``.
            source: The file, for error messages.

        Raises:
            UserError: It is something else.
        """
        try:
            scale, shift = (torch.tensor(found[name], dtype=torch.float32) for name in ("scale", "shift"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: calibration is no scale and shift of numbers ({error})") from error
        if scale.shape != shape or shift.shape != shape:
            raise UserError(f"{source}: calibration has shapes {tuple(scale.shape)}, {tuple(shift.shape)}, not {shape}")
        if not (scale.isfinite().all() and shift.isfinite().all() and scale.min() > 0):
            raise UserError(f"{source}: calibration is not all finite, with scales above 0")
        return Calibration(scale, shift)


def calibrate(predictor: "Predictor", batches: Iterable[Batch]) -> Calibration:
    """Fit a calibration by the likelihood of choices that the predictor was not fitted on.

    Args:
        predictor: In evaluation mode; its own calibration is left aside.
        batches: Held-out sequences.

    Raises:
        UserError: There are none.
    """
    every = list(batches)
    tokens = sum(int(batch.lengths.sum()) for batch in every)
    if tokens == 0:
        raise UserError("calibration needs held-out sequences, and there are none")
    logits, chosen = [], []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for batch in every:
            found = predictor(batch)[batch.mask].float().cpu()
            part = torch.rand(len(found), generator=generator) * tokens < TOKENS
            logits.append(found[part])
            chosen.append(batch.targets(predictor.geometry.num_experts)[batch.mask].cpu()[part])
    x, y = torch.cat(logits), torch.cat(chosen)
    scales, shifts = [], []
    for index in range(x.shape[1]):
        scale, shift = _fit(predictor, x[:, index], y.to(x.dtype))
        scales.append(scale)
        shifts.append(shift)
    return Calibration(torch.stack(scales), torch.stack(shifts))


def _fit(predictor: "Predictor", logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Fit all layers ``(N, L, E)`` of one lookahead; return ``(L,)`` each."""
    log_scale, shift = (nn.Parameter(logits.new_zeros(logits.shape[1])) for _ in range(2))
    parameters = [log_scale, shift] if predictor.activation == "sigmoid" else [log_scale]
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scaled = logits * _scale(log_scale)[:, None] + shift[:, None]
        p = predictor.apply_activation(scaled).clamp(SURE, 1 - SURE)
        value = nn.functional.binary_cross_entropy(p, chosen) * logits.shape[-1]
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return _scale(log_scale).detach(), shift.detach()


def _scale(log_scale: Tensor) -> Tensor:
    """Return the scale, within bounds that are approached smoothly."""
    return (MOST_STRETCH * (log_scale / MOST_STRETCH).tanh()).exp()
