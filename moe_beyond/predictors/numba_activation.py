"""Activations for steppers: `Predictor.probabilities` for a few layers, without the overhead of torch."""

import math

import numpy as np
import numpy.typing as npt

from moe_beyond.compiling import compiled

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
ACTIVATIONS = ("sigmoid", "softmax", "subset")
# Settings of the search for the shift of a subset. They are defined here because numba's cache of compiled code
# notices changes of this file only.
MAX_STEPS, STEP_TOLERANCE, CERTAIN_LOGIT = 60, 1e-4, 20.0


@compiled
def apply_activation_numba(
    logits: Floats, scale: Floats, shift: Floats, lookaheads: Indices, layers: Indices, activation: int, top_k: int
) -> Floats:
    """Calibrate logits and return probabilities ``(n, E)``.

    Args:
        logits: Logits ``(n, E)`` of n layers.
        scale: Calibration scale ``(H, L)``.
        shift: Calibration shift ``(H, L)``.
        lookaheads: Index into H of each row, ``(n,)``.
        layers: Layer of each row, ``(n,)``.
        activation: Index into `ACTIVATIONS`.
        top_k: Experts per token and layer, K.
    """
    out = np.empty_like(logits)
    for row in range(len(logits)):
        x = logits[row] * scale[lookaheads[row], layers[row]] + shift[lookaheads[row], layers[row]]
        if activation == 0:
            out[row] = 1 / (1 + np.exp(-x))
            continue
        highest = x.max()
        total = 0.0
        for value in x:
            total += math.exp(value - highest)
        if activation == 1:
            for i in range(len(x)):
                out[row, i] = min(top_k * math.exp(x[i] - highest) / total, 1.0)
            continue
        subset_shift = x.min() - CERTAIN_LOGIT
        if top_k < len(x):
            odds = math.log(top_k / (len(x) - top_k))
            low, high = x.min() - odds, highest - odds
            subset_shift = min(highest + math.log(total) - math.log(top_k), high)
            for _ in range(MAX_STEPS):
                total = slope = 0.0
                for value in x:
                    probability = 1 / (1 + math.exp(subset_shift - value))
                    total += probability
                    slope += probability * (1 - probability)
                if total > top_k:
                    low = subset_shift
                else:
                    high = subset_shift
                proposal = subset_shift + math.log(total / top_k) / max(slope / total, 1e-12)
                if not low <= proposal <= high:
                    proposal = (low + high) / 2
                step, subset_shift = abs(proposal - subset_shift), proposal
                if step < STEP_TOLERANCE:
                    break
        for i in range(len(x)):
            out[row, i] = 1 / (1 + math.exp(subset_shift - x[i]))
    return out
