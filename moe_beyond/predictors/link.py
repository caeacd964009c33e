"""Probabilities out of a few logits: what `Predictor.probabilities` computes, sooner than torch can be called."""

import math

import numba
import numpy as np
import numpy.typing as npt

from moe_beyond.predictors.loss import LARGEST_STEP, MOST_STEPS, SMALL_STEP

Floats = npt.NDArray[np.float32]
LINKS = ("sigmoid", "softmax", "subset")


@numba.njit(cache=True)
def link_now(logits: Floats, scale: Floats, shift: Floats, link: int, top_k: int) -> Floats:
    """Return probabilities ``(n, E)`` of logits ``(n, E)``.

    Args:
        logits: Of n layers.
        scale: ``(n,)``, what the calibration multiplies each layer's by.
        shift: ``(n,)``, and then adds.
        link: Index into `LINKS`.
        top_k: K.
    """
    out = np.empty_like(logits)
    for row in range(len(logits)):
        x = logits[row] * scale[row] + shift[row]
        if link == 0:
            out[row] = 1 / (1 + np.exp(-x))
            continue
        highest = x.max()
        total = 0.0
        for value in x:
            total += math.exp(value - highest)
        if link == 1:
            for i in range(len(x)):
                out[row, i] = min(top_k * math.exp(x[i] - highest) / total, 1.0)
            continue
        moved = x.min() - 20.0
        if top_k < len(x):
            moved = highest + math.log(total) - math.log(top_k)
            for _ in range(MOST_STEPS):
                total = slope = 0.0
                for value in x:
                    chosen = 1 / (1 + math.exp(moved - value))
                    total += chosen
                    slope += chosen * (1 - chosen)
                step = math.log(total / top_k) / max(slope / total, 1e-12)
                step = min(max(step, -LARGEST_STEP), LARGEST_STEP)
                moved += step
                if abs(step) < SMALL_STEP:
                    break
        for i in range(len(x)):
            out[row, i] = 1 / (1 + math.exp(moved - x[i]))
    return out
