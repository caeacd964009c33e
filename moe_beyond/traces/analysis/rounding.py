"""Figures as JSON has them."""

from typing import Any

import numpy as np
import numpy.typing as npt


def rounded(values: npt.ArrayLike) -> Any:
    """Round for reading; None stands for a figure that does not exist, since JSON has no NaN.

    Args:
        values: A number, or an array of any shape.

    Returns:
        A float or None, or nested lists of them.

    Example:
        >>> rounded(1 / 3), rounded([[0.5, float("nan")]])
        (0.333333, [[0.5, None]])
    """
    values = np.asarray(values, np.float64)
    if values.ndim:
        return [rounded(value) for value in values]
    return None if np.isnan(values) else round(float(values), 6)
