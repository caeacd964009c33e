import itertools
import math

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import random_trace
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.row_encoder import RowEncoder
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.numba_activation import ACTIVATIONS, apply_activation_numba
from moe_beyond.predictors.objectives import (
    binary_cross_entropy,
    k_positive_cross_entropy,
    ranking_loss,
    subset_cross_entropy,
    subset_shift,
)
from moe_beyond.traces.trace import Trace


def batch(*chosen: list[list[list[int]]]):
    """Sequences of experts by token and layer."""
    return collate(
        [
            Trace(f"s{i}", "tests", np.zeros(len(experts), np.int32), np.array(experts, np.uint8), len(experts))
            for i, experts in enumerate(chosen)
        ]
    )


def test_the_cross_entropy_of_one_token_by_hand():
    # Softmax (1/2, 1/4, 1/8, 1/8); experts 0 and 2 were chosen: (ln 2 + ln 8) / 2.
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().view(1, 1, 1, 1, 4)
    assert float(k_positive_cross_entropy(logits, batch([[[0, 2]]]))) == pytest.approx(2 * math.log(2))


def test_the_cross_entropy_is_a_mean_over_real_tokens_layers_and_lookaheads():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = torch.full((2, 2, 2, 2, 4), float("nan"))  # padding must not count, whatever it holds
    logits[0, 0] = logits[1] = shares.log() + 3  # a constant does not matter
    logits[0, 0, 1, 1] = shares.flip(0).log()
    chosen = batch([[[3, 2], [1, 3]]], [[[0, 2], [0, 1]], [[2, 3], [1, 0]]])
    # In units of ln 2 a chosen expert costs 1, 2, 3, 3. Both lookaheads see the second sequence alike:
    # (1+3)/2, (1+2)/2, (3+3)/2, (2+1)/2; the first has (3+3)/2 twice, (2+3)/2 once, and flipped (3+1)/2 once.
    expected = math.log(2) * (2 * (2 + 1.5 + 3 + 1.5) + 3 + 3 + 2.5 + 2) / 12
    assert float(k_positive_cross_entropy(logits, chosen)) == pytest.approx(expected)


def test_the_cross_entropy_is_a_mean_over_what_was_chosen():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(1, 2, 1, 2, 4)
    # Expert 0 twice and 2 once: 1, 1 and 3 in units of ln 2; slots without an expert are left out.
    chosen = batch([[[255, 0], [255, 255]], [[0, 2], [255, 255]]])
    assert float(k_positive_cross_entropy(logits, chosen)) == pytest.approx(5 / 3 * math.log(2))


def test_the_cross_entropy_is_least_where_the_softmax_is_a_kth_of_the_probability():
    # Three of four tokens chose experts 0 and 1, one chose 0 and 2.
    chosen = batch([[[0, 1]], [[1, 0]], [[0, 1]], [[0, 2]]])
    best = torch.tensor([0.5, 0.375, 0.125, 1e-9]).log()
    generator = torch.Generator().manual_seed(0)
    least = float(k_positive_cross_entropy(best.expand(1, 4, 1, 1, 4), chosen))
    for _ in range(20):
        other = best + 0.3 * torch.randn(4, generator=generator)
        assert float(k_positive_cross_entropy(other.expand(1, 4, 1, 1, 4), chosen)) > least


def test_binary_cross_entropy_of_the_row_encoder_by_hand():
    predictor = RowEncoder(TINY, VOCAB, token_width=4, layer_width=4, width=4, depth=1, heads=1, feedforward=4)
    layers, experts, _ = TINY.shape()
    chosen = batch([[[4, 5]] * layers], [[[0, 1]] * layers, [[2, 3]] * layers])
    logits = torch.full((2, 2, 1, layers, experts), float("nan"))
    # All at probability 1/4: a chosen expert costs ln 4, another ln 4/3; two of eight are chosen.
    logits[chosen.mask] = torch.logit(torch.tensor(0.25)).expand(3, 1, layers, experts)
    expected = (2 * math.log(4) + 6 * math.log(4 / 3)) / 8
    assert float(predictor.loss(logits, chosen)) == pytest.approx(expected, rel=1e-6)


@given(arrays(np.float64, (3, 9), elements=st.floats(-15, 15)), st.integers(1, 8))
def test_shifted_sigmoids_add_up_to_k(logits, top_k):
    x = torch.from_numpy(logits)
    assert (x - subset_shift(x, top_k)).sigmoid().sum(-1).numpy() == pytest.approx(top_k, abs=1e-3)


def test_choices_beyond_doubt_stay_finite():
    x = torch.full((2, 64), -50.0)
    x[:, :6] = torch.tensor([[50.0], [30.0]])
    chosen = (x - subset_shift(x, 6)).sigmoid()
    assert chosen[:, :6].min() > 0.999
    assert chosen[:, 6:].max() < 0.001


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 40.0, 200.0])
def test_logits_however_far_apart_add_up_to_k(scale):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * scale
    assert (x - subset_shift(x, 6)).sigmoid().sum(-1).numpy() == pytest.approx(6, abs=0.02)
    rows, one = np.arange(200), np.ones((1, 200), np.float32)  # as many layers, and a calibration that changes nothing
    now = apply_activation_numba(x.numpy(), one, one - 1, rows - rows, rows, ACTIVATIONS.index("subset"), 6)
    assert now.sum(-1) == pytest.approx(6, abs=0.02)


def test_all_of_k_are_surely_chosen():
    x = torch.tensor([[0.0, -3.0, 7.0]])
    assert (x - subset_shift(x, 3)).sigmoid().min() > 1 - 1e-6


def test_the_gradient_of_the_subset_is_probability_minus_choice():
    torch.manual_seed(0)
    both = collate([random_trace("a", 4, 0), random_trace("b", 2, 1)])
    layers, experts, top_k = TINY.shape()
    logits = (torch.randn(2, 4, 2, layers, experts) * 3).requires_grad_()
    subset_cross_entropy(logits, both).backward()
    chosen = both.targets(experts)[:, :, None].float()
    expected = (logits - subset_shift(logits, top_k)).sigmoid() - chosen
    expected = torch.where(both.mask[..., None, None, None], expected, 0.0) / (6 * 2 * layers)
    torch.testing.assert_close(logits.grad, expected.detach())


def test_the_subset_is_that_of_weighted_draws():
    """Where K of E are drawn with odds exp(logit) each, by enumeration, the probabilities are near."""
    logits = torch.tensor([1.5, -0.5, 0.0, 2.0, -1.0, 0.5, -2.0, 1.0, 0.25, -0.75, 0.75, -1.5], dtype=torch.float64)
    weights = {s: float(logits[list(s)].sum().exp()) for s in itertools.combinations(range(12), 4)}
    total = sum(weights.values())
    exact = [sum(w for s, w in weights.items() if e in s) / total for e in range(12)]
    found = (logits - subset_shift(logits, 4)).sigmoid().tolist()
    assert found == pytest.approx(exact, abs=0.04)


def test_binary_cross_entropy_by_hand():
    # All at probability 1/4: a chosen expert costs ln 4, another ln 4/3; two of four are chosen.
    logits = torch.logit(torch.tensor(0.25)).expand(1, 1, 1, 1, 4)
    found = float(binary_cross_entropy(logits, batch([[[0, 2]]])))
    assert found == pytest.approx(2 * math.log(4) + 2 * math.log(4 / 3), rel=1e-6)


def test_the_ranking_loss_by_hand():
    # Experts 0 and 2 are selected. The differences other - selected are 1 - 2, 1 - 0, -1 - 2 and -1 - 0.
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).view(1, 1, 1, 1, 4)
    expected = math.log(1 + math.exp(-1) + math.exp(1) + math.exp(-3) + math.exp(-1))
    chosen = batch([[[0, 2]]])
    for constant in (0, 5):
        assert float(ranking_loss(logits + constant, chosen)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="objective ranking: fits an order"):
        ranking_loss(logits, chosen, logits)


@pytest.mark.parametrize("objective", [k_positive_cross_entropy, subset_cross_entropy, binary_cross_entropy])
def test_soft_targets_replace_the_selected_experts(objective):
    torch.manual_seed(0)
    both = collate([random_trace("a", 4, 0), random_trace("b", 2, 1)])
    layers, experts, _ = TINY.shape()
    logits = torch.randn(2, 4, 2, layers, experts) * 3
    chosen = both.targets(experts)[:, :, None].float().expand_as(logits)
    torch.testing.assert_close(objective(logits, both, chosen), objective(logits, both))
    # Half of the soft targets select another K experts: the loss is linear in its targets.
    other = chosen.roll(1, -1)
    mixed, apart = objective(logits, both, (chosen + other) / 2), objective(logits, both, other)
    torch.testing.assert_close(mixed, (apart + objective(logits, both)) / 2)
