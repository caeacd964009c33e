"""Calibration: scaled and shifted logits, so that predicted probabilities match observed frequencies.

Each lookahead and layer has one scale and one shift (Platt 1999; Guo et al. 2017, arXiv 1706.04599): the activation
receives scale * logit + shift. Scales are above 0, so the order of a layer's experts and recall do not change. With the
activations softmax and subset, a shift has no effect.
"""

from typing import Any

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief


class Calibration:
    """Scales and shifts of logits.

    Args:
        scale: Scales ``(H, L)``, above 0.
        shift: Shifts ``(H, L)``.

    Attributes:
        scale: Scales ``(H, L)`` float32.
        shift: Shifts ``(H, L)`` float32.
        arrays: Scales and shifts as numpy arrays, for steppers.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale.float().cpu(), shift.float().cpu()
        self.arrays = self.scale.numpy(), self.shift.numpy()

    def __call__(self, logits: Tensor) -> Tensor:
        """Return calibrated logits.

        Args:
            logits: Logits ``(..., H, L, E)``.
        """
        scale, shift = (x.to(logits.device)[..., None] for x in (self.scale, self.shift))
        return logits * scale + shift

    def to_json(self) -> dict[str, list[list[float]]]:
        """Return scales and shifts as lists, H lists of L numbers each."""
        return {"scale": self.scale.tolist(), "shift": self.shift.tolist()}

    @staticmethod
    def from_json(content: Any, shape: tuple[int, int], source: str) -> "Calibration":
        """Read the output of `to_json`.

        Args:
            content: Field ``calibration`` of a predictor's configuration.
            shape: Expected shape ``(H, L)``.
            source: Path of the file, for error messages.

        Raises:
            UserError: The content is not a calibration of this shape.
        """
        try:
            scale, shift = (torch.tensor(content[name], dtype=torch.float32) for name in ("scale", "shift"))
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f"{source}: calibration has no scale and shift of numbers ({brief(error)})") from error
        if scale.shape != shape or shift.shape != shape:
            shapes = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
            raise UserError(f"{source}: calibration must have shapes {shape} (got {shapes})")
        if not (scale.isfinite().all() and shift.isfinite().all() and scale.min() > 0):
            raise UserError(f"{source}: calibration must be finite, with scales above 0")
        return Calibration(scale, shift)
