from fractions import Fraction

import numpy as np
import pytest
import torch
from _helpers.common import TINY
from _helpers.common import VOCAB as TINY_VOCAB
from _helpers.predictor_variants import LONG, random_trace

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.eamc import Eamc
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.traces.trace import Trace

SMALL = Geometry("small", (0, 1), num_experts=4, top_k=2, params_per_expert=1, other_params_per_layer=1)
VOCAB = 10
Sequence = list[list[list[int]]]  # experts of each token and layer


def batch_of(*sequences: Sequence) -> Batch:
    traces = []
    for number, experts in enumerate(sequences):
        ids = np.arange(len(experts), dtype=np.int32)
        traces.append(Trace(f"s{number}", "tests", ids, np.array(experts, np.uint8), len(experts)))
    return collate(traces)


def fitted(*sequences: Sequence, capacity: int = 4, backoff: float = 1.0, ahead: int = 1) -> Eamc:
    predictor = Eamc(SMALL, VOCAB, capacity, backoff, ahead)
    predictor.partial_fit(batch_of(*sequences))
    return predictor.eval()


def scores(predictor: Eamc, *sequences: Sequence) -> np.ndarray:
    with torch.inference_mode():
        return predictor.probabilities(predictor(batch_of(*sequences))).numpy()


ONES: Sequence = [[[0, 1], [0, 1]]] * 2
TWOS: Sequence = [[[2, 3], [2, 3]]]
MIXED: Sequence = [[[0, 1], [2, 3]]]
NEARLY_MIXED: Sequence = [[[0, 1], [0, 2]]]


def test_matrices_are_stored_in_order_and_padding_is_not_counted():
    predictor = fitted(ONES, TWOS, MIXED)
    assert predictor.tokens.tolist() == [2, 1, 1, 0]
    assert predictor.matrices.tolist() == [
        [[2, 2, 0, 0], [2, 2, 0, 0]],
        [[0, 0, 1, 1], [0, 0, 1, 1]],
        [[1, 1, 0, 0], [0, 0, 1, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]


def test_a_full_collection_gives_up_the_most_similar_matrix():
    # cos(mixed, ones) = 4 / (2 * 4) = cos(mixed, twos) = 2 / (2 * 2): the lowest place goes.
    predictor = fitted(ONES, TWOS, MIXED, capacity=2)
    mixed, twos = [[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert predictor.matrices.tolist() == [mixed, twos]
    assert predictor.tokens.tolist() == [1, 1]
    # cos with mixed: 3 / (2 * 2); with twos: 1 / (2 * 2).
    predictor.partial_fit(batch_of(NEARLY_MIXED))
    nearly = [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert predictor.matrices.tolist() == [nearly, twos]
    # Length does not count: three times the same is the same direction.
    predictor.partial_fit(batch_of(TWOS * 3))
    assert predictor.matrices.tolist() == [nearly, [[0, 0, 3, 3], [0, 0, 3, 3]]]
    assert predictor.tokens.tolist() == [1, 3]


def test_a_batch_is_its_sequences_one_after_the_other():
    traces = [random_trace(f"s{i}", LONG - 3 * i, i) for i in range(9)]
    together, apart = (Eamc(TINY, TINY_VOCAB, capacity=4) for _ in range(2))
    together.partial_fit(collate(traces))
    for trace in traces:
        apart.partial_fit(collate([trace]))
    assert torch.equal(together.matrices, apart.matrices)
    assert torch.equal(together.tokens, apart.tokens)
    assert len(set(together.tokens.tolist())) == 4  # no two sequences are of one length


# Its matrix is [[3, 2, 1, 0], [2, 2, 1, 1]]; squared norms 14 and 10.
SPREAD: Sequence = [[[0, 1], [0, 1]], [[0, 1], [0, 1]], [[0, 2], [2, 3]]]
# Counts over the four tokens of SPREAD and MIXED and one imaginary token.
POPULARITY = np.array([[4.5, 3.5, 1.5, 0.5], [2.5, 2.5, 2.5, 2.5]]) / 5
OF_SPREAD = (np.array([[3, 2, 1, 0], [2, 2, 1, 1]]) + POPULARITY) / 4
OF_MIXED = (np.array([[1, 1, 0, 0], [0, 0, 1, 1]]) + POPULARITY) / 2


def test_probabilities_by_hand():
    found = scores(fitted(SPREAD, MIXED), [[[0, 1], [0, 1]], [[0, 1], [2, 3]]])[0]
    expected = np.empty((2, 2, 2, 4))  # tokens, lookaheads 1 and "token", layers, experts
    # Nothing is routed before the first token's first layer.
    expected[0, :] = POPULARITY
    # Then only the first layer compares: 5**2 / 14 < 2**2 / 2, although 5**2 / 24 > 2**2 / 4 for whole norms.
    expected[0, 0, 1] = OF_MIXED[1]
    # After the first token 9**2 / 24 > 2**2 / 4; and with one more layer 14**2 / 24 > 4**2 / 4, over all layers.
    expected[1, :] = OF_SPREAD
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_stepper_by_hand():
    stepper = fitted(SPREAD, MIXED).stepper()
    nothing = [np.nan] * 4
    moments = [
        (None, POPULARITY),
        ([0, 1], [nothing, OF_MIXED[1]]),
        ([0, 1], [nothing, nothing]),
        (None, OF_SPREAD),
        ([0, 1], [nothing, OF_SPREAD[1]]),
    ]
    layer = 0
    for experts, expected in moments:
        if experts is None:
            stepper.observe_token(7)
            layer = 0
        else:
            stepper.observe_layer(layer, experts)
            layer += 1
        np.testing.assert_allclose(stepper.scores(), expected, rtol=1e-6)


@pytest.mark.parametrize("backoff", [2.0, 0.5, 0.0])
def test_backoff_weighs_the_popularity(backoff: float):
    found = scores(fitted(SPREAD, MIXED, backoff=backoff), SPREAD)[0, 2, 0]
    expected = (np.array([[3, 2, 1, 0], [2, 2, 1, 1]]) + backoff * POPULARITY) / (3 + backoff)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_request_that_shares_no_expert_gets_the_popularity():
    found = scores(fitted(ONES), TWOS * 2)[0]
    np.testing.assert_allclose(found, np.broadcast_to([2.5 / 3, 2.5 / 3, 0.5 / 3, 0.5 / 3], found.shape), rtol=1e-6)


def test_without_matrices_every_expert_is_equally_likely():
    empty = Eamc(SMALL, VOCAB, backoff=0.0)
    np.testing.assert_allclose(scores(empty, ONES), 0.5)
    stepper = empty.stepper()
    stepper.observe_token(3)
    np.testing.assert_allclose(stepper.scores(), 0.5)


def test_the_lookaheads_are_those_asked_for():
    assert Eamc(SMALL, VOCAB).information.lookaheads == (1, 2, 3, "token")
    assert Eamc(SMALL, VOCAB, ahead=0).information.lookaheads == ("token",)


@pytest.mark.parametrize("times", [3, 7])
def test_what_is_equally_similar_is_so_to_the_bit(times: int):
    # Norms of sqrt(14 + 10) and 3 or 7 times that: roots would round, and choose by that.
    for first, second in ((SPREAD, SPREAD * times), (SPREAD * times, SPREAD)):
        rows = fitted(first, second)._rows(batch_of([*MIXED, *SPREAD]))[0]
        assert rows.flatten().tolist() == [4] + [0] * 7  # the popularity at first, then the lowest place


def test_rows_are_those_of_plain_arithmetic():
    predictor = Eamc(TINY, TINY_VOCAB, capacity=8)
    predictor.partial_fit(collate([random_trace(f"train{i}", 3 + i, 100 + i) for i in range(6)]))
    trace = random_trace("a", 12, 0)
    expected, own = [], np.zeros(TINY.shape()[:2], int)
    for token, by_layer in enumerate(trace.experts):
        for layer, chosen in enumerate(by_layer):
            compared = slice(layer if token == 0 else None)  # nothing else was routed
            best, row = Fraction(0), predictor.capacity
            for place, matrix in enumerate(predictor.matrices.numpy().astype(int)):
                dot, norm = (own * matrix).sum(), (matrix[compared] ** 2).sum()
                if norm and Fraction(int(dot) ** 2, int(norm)) > best:
                    best, row = Fraction(int(dot) ** 2, int(norm)), place
            expected.append(row)
            own[layer, chosen] += 1
    assert predictor._rows(collate([trace])).flatten().tolist() == expected
    assert len(set(expected)) > 3


def test_a_sequence_longer_than_its_matrix_counts_is_refused():
    predictor = fitted(ONES)
    before = predictor.matrices.clone()
    with pytest.raises(UserError, match="'s1' has more than 32,767 tokens, the largest count; set data"):
        predictor.partial_fit(batch_of(TWOS, TWOS * 32_768))
    assert torch.equal(predictor.matrices, before)
    predictor.partial_fit(batch_of(TWOS * 32_767))
    assert predictor.matrices[1].tolist() == [[0, 0, 32_767, 32_767]] * 2
    np.testing.assert_allclose(scores(predictor, TWOS * 2)[0, 1], [[[0, 0, 1, 1]] * 2] * 2, atol=1e-4)


@pytest.mark.parametrize("arguments", [{"capacity": 0}, {"backoff": -1.0}, {"ahead": -1}], ids=str)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, int]):
    with pytest.raises(UserError, match=f"eamc: {next(iter(arguments))} must be"):
        Eamc(SMALL, VOCAB, **arguments)
