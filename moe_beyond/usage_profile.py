"""What training text tells of a model's experts: how popular each is, and how their use comes in bursts.

The history of an expert in a sequence is its age, the tokens since it was last used (1: the token before used it; 0:
none did), and its rate r = (PRIOR * popularity + c) / (PRIOR + Z), where per token c <- DECAY * c + used and Z <- DECAY
* Z + 1. A table says how probable its use by the next token is, by buckets of both: it was counted, so that it is
calibrated.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DECAY, PRIOR = 0.97, 24.0
AGE_EDGES = (1.0, 2.0, 3.0, 5.0, 9.0, 17.0, 33.0)
"""Where buckets of age begin, but for the first, which is age 0."""
RATE_EDGES = tuple(0.045 * (0.3 / 0.045) ** (i / 6) for i in range(7))
"""Where buckets of rate begin, but for the first, which begins at 0."""


@dataclass(frozen=True)
class UsageProfile:
    """What was counted on training text.

    Attributes:
        popularity: ``(L, E)`` float64, the share of tokens that chose an expert.
        hazard: ``(8, 8)`` float64, by buckets of age and rate: the probability that the next token uses an expert.
    """

    popularity: npt.NDArray[np.float64]
    hazard: npt.NDArray[np.float64]


def default_hazard() -> npt.NDArray[np.float64]:
    """Return a table ``(8, 8)`` for a model that none was counted for: rate times a factor of the age.

    The factors were counted on DeepSeek-V2-Lite's routing of Puffin prompts.
    """
    factors = np.array([0.825, 1.80, 1.07, 0.92, 0.86, 0.85, 0.81, 0.64])
    edges = np.array(RATE_EDGES)
    rates = np.concatenate([[0.036], np.sqrt(edges[:-1] * edges[1:]), [0.35]])
    table: npt.NDArray[np.float64] = np.clip(factors[:, None] * rates, 1e-3, 0.95)
    return table
