from fractions import Fraction

import numpy as np
import pytest
import torch
from _helpers.common import TINY
from _helpers.common import VOCAB as TINY_VOCAB
from _helpers.predictor_variants import LONG, random_trace, training_stats, uncounted

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.token_table import TokenTable
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.io.weights import load_weights
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.traces.trace import Trace

SMALL = Geometry("small", (0, 1), num_experts=4, top_k=2, params_per_expert=1, other_params_per_layer=1)
VOCAB = 10


def batch_of(*sequences: list[tuple[int, list[list[int]]]]) -> Batch:
    """Sequences of (token id, experts by layer)."""
    traces = []
    for number, sequence in enumerate(sequences):
        ids, experts = zip(*sequence, strict=True)
        trace = Trace(f"s{number}", "tests", np.array(ids, np.int32), np.array(experts, np.uint8), len(ids))
        traces.append(trace)
    return collate(traces)


# Token 5 occurs three times, token 7 once, in sequences of different length.
COUNTED = batch_of(
    [(5, [[0, 1], [2, 3]]), (7, [[3, 1], [0, 1]]), (5, [[1, 0], [2, 1]])],
    [(5, [[2, 0], [2, 0]])],
)


def table(batches: list[Batch], backoff: float = 2.0) -> TokenTable:
    predictor = TokenTable(SMALL, VOCAB, backoff)
    predictor.prepare(TrainingStats(np.bincount([5, 5, 7, 5], minlength=VOCAB), None, uncounted, uncounted))
    for batch in batches:
        predictor.partial_fit(batch)
    return predictor.eval()


def scores(predictor: TokenTable, token: int) -> list[list[float]]:
    with torch.inference_mode():
        logits = predictor(batch_of([(token, [[0, 1], [0, 1]])]))
    return predictor.probabilities(logits)[0, 0, 0].tolist()


def test_counts_are_exact_and_padding_is_not_counted():
    predictor = table([COUNTED])
    assert predictor.token_ids.tolist() == [-1, 5, 7]
    assert predictor.occurrences.tolist() == [0, 3, 1]
    none = [[0] * 4] * 2
    assert predictor.table.tolist() == [none, [[3, 2, 1, 0], [1, 1, 3, 1]], [[0, 1, 0, 1], [1, 1, 0, 0]]]


@pytest.mark.parametrize("backoff", [2.0, 0.5])
def test_probabilities_by_hand(backoff):
    predictor, weight = table([COUNTED], backoff), Fraction(backoff)
    # Four tokens and an imaginary one that chose each of 4 experts with probability K/E = 1/2.
    chosen = [[3, 3, 1, 1], [2, 2, 3, 1]]
    popularity = [[(count + Fraction(1, 2)) / 5 for count in layer] for layer in chosen]
    counts = {5: ([[3, 2, 1, 0], [1, 1, 3, 1]], 3), 7: ([[0, 1, 0, 1], [1, 1, 0, 0]], 1)}
    for token, (by_layer, seen) in counts.items():
        expected = [
            [float((count + weight * p) / (seen + weight)) for count, p in zip(layer, popular, strict=True)]
            for layer, popular in zip(by_layer, popularity, strict=True)
        ]
        np.testing.assert_allclose(scores(predictor, token), expected, rtol=1e-5)


@pytest.mark.parametrize("token", [0, 6, 9])
def test_an_unseen_token_gets_the_popularity(token):
    expected = [[0.7, 0.7, 0.3, 0.3], [0.5, 0.5, 0.7, 0.3]]
    np.testing.assert_allclose(scores(table([COUNTED]), token), expected, rtol=1e-5)


def test_without_counts_every_expert_is_equally_likely():
    unprepared = TokenTable(SMALL, VOCAB)
    np.testing.assert_allclose(scores(unprepared, 3), np.full((2, 4), 0.5), rtol=1e-6)
    np.testing.assert_allclose(scores(table([]), 5), np.full((2, 4), 0.5), rtol=1e-6)


def test_an_expert_that_always_and_one_that_never_came_have_finite_logits():
    always = batch_of([(5, [[0, 1], [0, 1]])] * 1000)
    predictor = table([always], backoff=1e-9)
    with torch.inference_mode():
        assert predictor(always).isfinite().all()
    np.testing.assert_allclose(scores(predictor, 5), [[1, 1, 0, 0]] * 2, atol=2e-6)


def test_without_backoff_an_unseen_token_still_gets_the_popularity():
    predictor = table([COUNTED], backoff=0.0)
    np.testing.assert_allclose(scores(predictor, 7), [[0, 1, 0, 1], [1, 1, 0, 0]], atol=2e-6)
    np.testing.assert_allclose(scores(predictor, 6), [[0.7, 0.7, 0.3, 0.3], [0.5, 0.5, 0.7, 0.3]], rtol=1e-5)


def test_counting_twice_doubles_the_counts():
    once, twice = table([COUNTED]), table([COUNTED, COUNTED])
    assert torch.equal(2 * once.occurrences, twice.occurrences)
    assert torch.equal(2 * once.table, twice.table)


def test_counts_do_not_depend_on_the_batches():
    traces = [random_trace(f"s{i}", LONG, i) for i in range(4)]
    whole, parts = (TokenTable(TINY, TINY_VOCAB) for _ in range(2))
    for predictor in (whole, parts):
        predictor.prepare(training_stats(traces))
    whole.partial_fit(collate(traces))
    with torch.inference_mode():
        for part in (traces[:1], traces[1:]):
            parts.partial_fit(collate(part))
            parts(collate(part))  # scoring in between keeps nothing of the counts so far
        assert torch.equal(whole.table, parts.table)
        assert torch.equal(whole(collate(traces)), parts(collate(traces)))


def test_tokens_that_are_rare_and_those_never_seen_share_a_row():
    predictor = TokenTable(SMALL, VOCAB, min_count=2)
    predictor.prepare(TrainingStats(np.bincount([5, 5, 7, 5], minlength=VOCAB), None, uncounted, uncounted))
    predictor.partial_fit(COUNTED)
    assert predictor.token_ids.tolist() == [-1, 5]
    assert predictor.occurrences.tolist() == [1, 3]
    own = table([COUNTED])
    np.testing.assert_allclose(scores(predictor, 5), scores(own, 5), rtol=1e-6)
    for token in (0, 6, 7):
        np.testing.assert_allclose(scores(predictor, token), scores(own, 7), rtol=1e-6)


def test_weights_of_the_layout_without_a_row_for_others_are_refused():
    weights = {name: value[1:] for name, value in table([COUNTED]).state_dict().items()}
    with pytest.raises(UserError, match="w: token_ids are not -1, for all other tokens, and then ascending"):
        load_weights(TokenTable(SMALL, VOCAB), weights, "w")


def test_weights_bring_their_own_number_of_rows():
    predictor, fresh = table([COUNTED]), TokenTable(SMALL, VOCAB)
    fresh.load_state_dict(predictor.state_dict())
    assert torch.equal(fresh(COUNTED), predictor(COUNTED))
    shorter = {**predictor.state_dict(), "occurrences": predictor.occurrences[:1]}
    with pytest.raises(RuntimeError, match="size mismatch for occurrences"):
        TokenTable(SMALL, VOCAB).load_state_dict(shorter)
