"""Probabilities out of a few logits: what `Predictor.probabilities` computes, sooner than torch can be called."""

import math

import numpy as np
import numpy.typing as npt

from moe_beyond.compiling import compiled

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
ACTIVATIONS = ("sigmoid", "softmax", "subset")
# Of the search for the shift of a subset; here, since numba's store of compiled code sees changes of this file alone.
MOST_STEPS, SMALL_STEP, SURELY = 60, 1e-4, 20.0


@compiled
def apply_activation_numba(
    logits: Floats, scale: Floats, shift: Floats, lookaheads: Indices, layers: Indices, link: int, top_k: int
) -> Floats:
    """Return probabilities ``(n, E)`` of logits ``(n, E)``.

    Args:
        logits: Of n layers.
        scale: ``(H, L)``, what the calibration multiplies by.
        shift: ``(H, L)``, and then adds.
        lookaheads: ``(n,)``, of each its index into H.
        layers: ``(n,)``, and its layer.
        link: Index into `ACTIVATIONS`.
        top_k: K.
    """
    out = np.empty_like(logits)
    for row in range(len(logits)):
        x = logits[row] * scale[lookaheads[row], layers[row]] + shift[lookaheads[row], layers[row]]
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
        moved = x.min() - SURELY
        if top_k < len(x):
            odds = math.log(top_k / (len(x) - top_k))
            low, high = x.min() - odds, highest - odds
            moved = min(highest + math.log(total) - math.log(top_k), high)
            for _ in range(MOST_STEPS):
                total = slope = 0.0
                for value in x:
                    chosen = 1 / (1 + math.exp(moved - value))
                    total += chosen
                    slope += chosen * (1 - chosen)
                if total > top_k:
                    low = moved
                else:
                    high = moved
                found = moved + math.log(total / top_k) / max(slope / total, 1e-12)
                if not low <= found <= high:
                    found = (low + high) / 2
                step, moved = abs(found - moved), found
                if step < SMALL_STEP:
                    break
        for i in range(len(x)):
            out[row, i] = 1 / (1 + math.exp(moved - x[i]))
    return out
