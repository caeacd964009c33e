"""Mutual information between layers: by hand, against plain loops, and of layers that know nothing of each other."""

import itertools
import math
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from _helpers.common import tiny_traces
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.traces.analysis import counts as counting
from moe_beyond.traces.analysis.counts import RoutingCounts, count_routing
from moe_beyond.traces.analysis.dependence import layer_dependence, mutual_information


def pair_counts(first, second, experts):
    """Count pairs of experts that tokens use in two layers."""
    counts = np.zeros((experts, experts), np.int64)
    for one, other in zip(first, second, strict=True):
        counts[np.ix_(one, other)] += 1
    return counts


def plain(first, second):
    """Mutual information in bits, uncorrected, and both entropies, of lists of sets."""
    pairs = [pair for one, other in zip(first, second, strict=True) for pair in itertools.product(one, other)]
    joint = Counter(pairs)
    margins = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    n = len(pairs)
    bits = sum(c / n * math.log2(c * n / margins[0][x] / margins[1][y]) for (x, y), c in joint.items())
    return bits, *(-sum(c / n * math.log2(c / n) for c in margin.values()) for margin in margins)


def test_by_hand():
    # Four tokens, one expert each, and the next layer's follows from it: one bit, of which a half over 4 ln 2 is bias.
    bits, dependence = mutual_information(np.array([[2, 0], [0, 2]]), 1)
    assert bits == pytest.approx(1 - 1 / (8 * math.log(2)))
    assert dependence == pytest.approx(bits)
    # Two groups of two that follow each other: entropies of two bits, of which the draw within a group takes one.
    groups = [(0, 1), (2, 3)] * 500
    bits, dependence = mutual_information(pair_counts(groups, groups[::-1], 4), 2)
    assert bits == dependence == pytest.approx(1 - 2 * 2 / (2 * 1000 * 4 * math.log(2)))
    # A layer that always uses the same experts has no dependence on another layer.
    stays = [(0, 1)] * 1000
    for first, second in ((groups, stays), (stays, groups), (stays, stays)):
        bits, dependence = mutual_information(pair_counts(first, second, 4), 2)
        assert bits == pytest.approx(0, abs=1e-12)
        assert math.isnan(dependence)


def test_what_the_correction_leaves_of_independent_layers_is_little():
    rng = np.random.default_rng(0)

    def draws():
        return (-rng.gumbel(size=(200, 12)) - np.linspace(0, 2, 12)).argsort(1)[:, :3].tolist()  # skewed

    samples = [(draws(), draws()) for _ in range(200)]
    uncorrected = np.mean([plain(*sample)[0] for sample in samples])
    corrected = np.mean([mutual_information(pair_counts(*sample, 12), 3)[0] for sample in samples])
    assert uncorrected == pytest.approx((12 - 3) ** 2 / (2 * 200 * 3**2 * math.log(2)), rel=0.1)
    assert corrected < uncorrected / 8  # not zero: an estimate below zero is zero


chosen = st.permutations(range(5)).map(lambda ids: ids[:2])


@given(st.lists(st.tuples(chosen, chosen), min_size=1, max_size=30))
def test_it_equals_plain_loops(tokens):
    first, second = zip(*tokens, strict=True)
    bits, *entropies = plain(first, second)
    used = [len(set(itertools.chain(*layer))) for layer in (first, second)]
    bits = max(bits - (used[0] - 2) * (used[1] - 2) / (2 * len(tokens) * 4 * math.log(2)), 0)
    most = min(entropies) - 1
    found = mutual_information(pair_counts(first, second, 5), 2)
    assert found[0] == pytest.approx(bits, abs=1e-9)
    if most > 1e-6:
        assert found[1] == pytest.approx(bits / most, abs=1e-6)
        assert 0 <= found[1] <= 1 + 1e-9


def test_layers_are_told_apart_and_large_models_pair_neighbours_alone(tmp_path):
    traces = tiny_traces(tmp_path / "set", sequences=20)
    experts = np.concatenate([trace.experts for trace in traces.traces()])
    bits, dependence = layer_dependence(count_routing(traces))
    for a, b in itertools.combinations(range(4), 2):
        expected = mutual_information(pair_counts(experts[:, a], experts[:, b], 8), 2)
        assert (bits[a, b], dependence[a, b]) == (bits[b, a], dependence[b, a]) == expected
    assert np.isnan(dependence.diagonal()).all()
    with patch.object(counting, "MAX_PAIR_COUNTS", 6 * 8 * 8 - 1):
        few = layer_dependence(count_routing(traces))[1]
        assert list(RoutingCounts.zeros(traces.geometry, layer_pairs=True).pairs) == [(0, 1), (1, 2), (2, 3)]
    assert few.diagonal(1).tolist() == dependence.diagonal(1).tolist()
    assert np.isnan(few[0, 2:]).all()
