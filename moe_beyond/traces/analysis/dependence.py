"""How much the experts of one layer tell about those of another.

X is one of the K experts that a token uses in the one layer, drawn at random, and Y one of those in the other. With the
shares p(x, y) of all tokens' K * K pairs,

    I(X; Y) = sum over x, y of p(x, y) log2 (p(x, y) / (p(x) p(y)))    bits

Estimated from n tokens that is too high by (R - K)(C - K) / (2 n K^2 ln 2) where the layers know nothing of each other,
R and C being how many of their experts were used at all: the mean of Pearson's chi-square statistic of such counts over
twice the pairs. For K = 1 it is the correction of Miller (Note on the bias of information estimates, 1955) in the form
of Panzeri and Treves (Analytical estimates of limited sampling biases, 1996). It is subtracted. Tokens of a text are
not independent, so some bias stays.

Since X and Y are drawn anew from the token's sets, I(X; Y) is at most min(H(X), H(Y)) - log2 K. Over that (among
normalised mutual informations the one by the smaller entropy: Vinh, Epps and Bailey, JMLR 2010) it is the dependence:
0 where layers are independent, 1 where groups of K experts follow each other without fail.
"""

import math

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.analysis.counts import RoutingCounts

Floats = npt.NDArray[np.float64]


def mutual_information(pairs: npt.NDArray[np.int64], top_k: int) -> tuple[float, float]:
    """Estimate how much two layers' experts tell of each other.

    Args:
        pairs: ``(E, E)``, how many tokens use an expert in the one layer and another in the other.
        top_k: K.

    Returns:
        Bits, corrected, at least 0; and the dependence in [0, 1], NaN where there is nothing to tell: where one of the
        layers uses no more than K experts, or all of them alike because K is E.
    """
    total = pairs.sum()
    joint = pairs / total
    one, other = joint.sum(1), joint.sum(0)
    seen = joint > 0
    told = float((joint[seen] * np.log2(joint[seen] / np.outer(one, other)[seen])).sum())
    bias = ((one > 0).sum() - top_k) * ((other > 0).sum() - top_k) / (2 * total * math.log(2))
    bits = max(told - float(bias), 0.0)
    most = min(_entropy(one), _entropy(other)) - math.log2(top_k)
    return bits, bits / most if most > 1e-9 else math.nan


def layer_dependence(counts: RoutingCounts) -> tuple[Floats, Floats]:
    """Estimate it for all pairs of layers that were counted.

    Returns:
        Bits and dependence, ``(L, L)`` float64, symmetric; NaN on the diagonal, where no pairs were counted, and where
        not every token uses K experts, which the estimate stands on.
    """
    layers, _, top_k = counts.geometry.shape()
    found = np.full((2, layers, layers), np.nan)
    for (first, second), pairs in counts.pairs.items():
        if counts.full[first] and counts.full[second]:
            found[:, first, second] = found[:, second, first] = mutual_information(pairs, top_k)
    return found[0], found[1]


def _entropy(shares: Floats) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())
