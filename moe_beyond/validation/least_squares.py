"""Least squares with coefficients from 0, robust to a few slow tokens."""

from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROUNDS = 5
"""Number of fits after which no more rows are left out."""
SPREADS = 4.0
"""Distance from the median residual beyond which a row is left out, in standard deviations."""
MOST_LEFT_OUT = 0.05
"""Share of the rows that may be left out; more of them are no outliers."""
DEVIATION = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""
BLOCKS = 5
"""Number of blocks of a robust mean."""
SAME = 1e-9
"""Relative difference of two squared errors that is rounding."""


def non_negative(columns: Floats, target: Floats) -> Floats:
    """Return the coefficients from 0 with the least squared error.

    The optimum is the ordinary solution on some of the columns, so all choices of a few columns are tried. Among equal
    errors, fewer columns win, then the first ones.

    Args:
        columns: Values of each row, ``(N, C)``; C is at most 3 or so.
        target: Value to explain, ``(N,)``.

    Returns:
        Coefficients, ``(C,)``.
    """
    best = np.zeros(columns.shape[1])
    least = float(target @ target)
    scale = np.abs(columns).max(axis=0, initial=0.0)
    used = [column for column in range(len(best)) if scale[column] > 0]
    for number in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, number)):
            scaled = columns[:, chosen] / scale[chosen]
            found = np.linalg.lstsq(scaled, target, rcond=None)[0]
            error = float(((scaled @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - SAME):
                least, best = error, np.zeros(len(best))
                best[chosen] = found / scale[chosen]
    return best


def robust(columns: Floats, target: Floats) -> Floats:
    """Return the result of `non_negative` without the few rows whose residuals are far from their median.

    Args:
        columns: Values of each row, ``(N, C)``.
        target: Value to explain, ``(N,)``.

    Returns:
        Coefficients, ``(C,)``.
    """
    kept = np.ones(len(target), np.bool_)
    found = non_negative(columns, target)
    for _ in range(ROUNDS):
        residual = target - columns @ found
        distance = np.abs(residual - np.median(residual[kept]))
        spread = DEVIATION * np.median(distance[kept])
        inside = distance <= max(SPREADS * spread, np.quantile(distance, 1 - MOST_LEFT_OUT))
        if spread == 0 or (inside == kept).all():
            break
        kept = inside
        found = non_negative(columns[kept], target[kept])
    return found


def robust_mean(values: Floats) -> float:
    """Return the median of the means of `BLOCKS` consecutive blocks of values.

    A few slow tokens change one or two of the blocks. Slow tokens that come again and again count, as they do for the
    speed of the whole text.

    Args:
        values: Values of consecutive tokens, ``(N,)``.
    """
    blocks = np.array_split(values, min(BLOCKS, len(values)))
    return float(np.median([block.mean() for block in blocks]))
