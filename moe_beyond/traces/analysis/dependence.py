"""Statistical dependence between the experts of two layers.

X is one of the K experts that a token uses in one layer, drawn at random, and Y one of those in the other layer. With
p(x, y), the shares of all tokens' K * K pairs, the mutual information is

    I(X; Y) = sum over x, y of p(x, y) log2 (p(x, y) / (p(x) p(y)))    bits

The estimate from n tokens is too high by (R - K)(C - K) / (2 n K^2 ln 2) if the layers are independent. R and C are the
numbers of experts that were used in each layer. This is the mean of Pearson's chi-square statistic of such counts
divided by twice the number of pairs. For K = 1 it is the correction of Miller (Note on the bias of information
estimates, 1955) in the form of Panzeri and Treves (Analytical estimates of limited sampling biases, 1996). It is
subtracted. Some bias remains, because the tokens of a text are not independent.

X and Y are independent draws from the token's sets, so I(X; Y) is at most min(H(X), H(Y)) - log2 K. The quotient of the
two is the dependence (the normalised mutual information with the smaller entropy: Vinh, Epps and Bailey, JMLR 2010). It
is 0 for independent layers, and 1 if groups of K experts always follow each other.
"""

import math

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.analysis.counts import RoutingCounts

Floats = npt.NDArray[np.float64]


def mutual_information(pairs: npt.NDArray[np.int64], top_k: int) -> tuple[float, float]:
    """Estimate the dependence between two layers.

    Args:
        pairs: ``(E, E)``, number of tokens that use an expert in the first layer and another in the second.
        top_k: Experts per entry, K.

    Returns:
        Corrected mutual information in bits, at least 0, and the dependence in [0, 1]. The dependence is NaN if one of
        the layers uses at most K experts, or all of them equally because K is E.
    """
    total = pairs.sum()
    joint = pairs / total
    first, second = joint.sum(1), joint.sum(0)
    positive = joint > 0
    estimate = float((joint[positive] * np.log2(joint[positive] / np.outer(first, second)[positive])).sum())
    bias = ((first > 0).sum() - top_k) * ((second > 0).sum() - top_k) / (2 * total * math.log(2))
    bits = max(estimate - float(bias), 0.0)
    maximum = min(_entropy(first), _entropy(second)) - math.log2(top_k)
    return bits, bits / maximum if maximum > 1e-9 else math.nan


def layer_dependence(counts: RoutingCounts) -> tuple[Floats, Floats]:
    """Estimate the dependence between all pairs of layers that were counted.

    Args:
        counts: Counts of a trace set.

    Returns:
        Bits and dependence, ``(L, L)`` float64, symmetric. They are NaN on the diagonal, for pairs that were not
        counted, and for layers in which some token uses fewer than K experts.
    """
    layers, _, top_k = counts.geometry.shape()
    estimates = np.full((2, layers, layers), np.nan)
    for (first, second), pairs in counts.pairs.items():
        if counts.all_top_k[first] and counts.all_top_k[second]:
            estimates[:, first, second] = estimates[:, second, first] = mutual_information(pairs, top_k)
    return estimates[0], estimates[1]


def _entropy(shares: Floats) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())
