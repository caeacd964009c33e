"""Usage profile of a model's experts, counted on training text: their popularity, and how their use clusters in time.

The history of an expert in a sequence has two numbers. Its age is the number of tokens since its last use (1: the
previous token used it; 0: no token did). Its rate is r = (PRIOR * popularity + c) / (PRIOR + Z), where for every token
c <- DECAY * c + used and Z <- DECAY * Z + 1. A table gives the probability that the next token uses the expert, by
buckets of age and rate. It is counted on training text, so it is calibrated.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DECAY, PRIOR = 0.97, 24.0
AGE_EDGES = (1.0, 2.0, 3.0, 5.0, 9.0, 17.0, 33.0)
"""Lower edges of the buckets of age, except the first bucket, which is age 0."""
RATE_EDGES = tuple(0.045 * (0.3 / 0.045) ** (i / 6) for i in range(7))
"""Lower edges of the buckets of rate, except the first bucket, which starts at 0."""


@dataclass(frozen=True)
class UsageProfile:
    """Counts of training text.

    Attributes:
        popularity: Share of tokens that use each expert, ``(L, E)`` float64.
        hazard: Probability that the next token uses an expert, by bucket of age and of rate, ``(8, 8)`` float64.
    """

    popularity: npt.NDArray[np.float64]
    hazard: npt.NDArray[np.float64]


def default_hazard() -> npt.NDArray[np.float64]:
    """Return a hazard table ``(8, 8)`` for a model without one: the rate times a factor of the age.

    The factors were counted on DeepSeek-V2-Lite's routing of Puffin prompts.
    """
    factors = np.array([0.825, 1.80, 1.07, 0.92, 0.86, 0.85, 0.81, 0.64])
    edges = np.array(RATE_EDGES)
    rates = np.concatenate([[0.036], np.sqrt(edges[:-1] * edges[1:]), [0.35]])
    table: npt.NDArray[np.float64] = np.clip(factors[:, None] * rates, 1e-3, 0.95)
    return table
