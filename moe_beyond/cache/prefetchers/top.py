"""top<m>: the m best-scored experts of a layer."""

import numpy as np
import numpy.typing as npt


def candidates(scores: npt.NDArray[np.float32], m: int) -> npt.NDArray[np.int64]:
    """Rank experts.

    Args:
        scores: ``(T, L, E)`` float.
        m: How many to name.

    Returns:
        ``(T, L, m)`` int64 expert ids within their layer, best first, ties by the lower id.
    """
    ranked: npt.NDArray[np.int64] = np.argsort(-scores, axis=-1, kind="stable")[..., :m]
    return ranked
