from dataclasses import replace

import numpy as np
import pytest
import torch
from _helpers.common import TINY
from _helpers.common import VOCAB as TINY_VOCAB
from _helpers.predictor_variants import LONG, random_trace

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.history import AGES, RATES, History, _Past
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import AGE_EDGES, DECAY, PRIOR, RATE_EDGES

SMALL = Geometry("small", (0,), num_experts=16, top_k=1, params_per_expert=1, other_params_per_layer=1)
VOCAB = 64


def batch_of(*sequences: list[int]) -> Batch:
    """Sequences of the one expert of each token."""
    traces = []
    for number, experts in enumerate(sequences):
        ids = np.arange(len(experts), dtype=np.int32)
        traces.append(Trace(f"s{number}", "tests", ids, np.array(experts, np.uint8)[:, None, None], len(experts)))
    return collate(traces)


def fitted(*batches: Batch) -> History:
    predictor = History(SMALL, VOCAB)
    for batch in batches:
        predictor.partial_fit(batch)
    return predictor.eval()


def scores(predictor: History, batch: Batch) -> np.ndarray:
    with torch.inference_mode():
        return predictor.probabilities(predictor(batch)).numpy()


def table(cells: dict[tuple[int, int], int]) -> list[list[int]]:
    found = np.zeros((AGES, RATES), int)
    for cell, count in cells.items():
        found[cell] = count
    return found.tolist()


# Over the five tokens and one imaginary token, 3 1/16 of 6 use expert 0, 1 1/16 each of 1 and 5, 1/16 each of others.
BATCH = batch_of([0, 0, 1, 0], [5])
# So before anything is used, expert 0 is in the last bucket of rates, 1 and 5 in the sixth (.159 .. .219), the other 13
# in the first. Nothing leaves these buckets but expert 5, at the fourth token: 24 * .177 / (24 + 2.9109) = .158.
TRIALS = {
    (0, 0): 5 * 13,  # never used
    (0, 7): 2,  # expert 0 at first, in both sequences
    (1, 7): 2,  # expert 0 after 0
    (2, 7): 1,  # expert 0 after 0, 1
    (0, 5): 2 + 2 + 2 + 2,  # experts 1 and 5, until 1 is used
    (1, 5): 1,  # expert 1 after 1: (24 * .177 + 1) / 26.9109 = .195
    (0, 4): 1,  # expert 5 at the fourth token
}
USES = {(0, 7): 1, (1, 7): 1, (0, 5): 2, (2, 7): 1}


def test_trials_and_uses_by_hand():
    predictor = fitted(BATCH)
    assert predictor.trials.tolist() == table(TRIALS)
    assert predictor.uses.tolist() == table(USES)
    assert predictor.trials.dtype == predictor.uses.dtype == torch.int64
    assert predictor.counts.tolist() == [[3, 1, 0, 0, 0, 1] + [0] * 10]
    assert predictor.tokens.tolist() == 5


def test_probabilities_by_hand():
    predictor = fitted(BATCH)
    # Two imaginary tokens chose each of 16 experts with probability K/E = 1/16.
    rare, fresh_0, after_0, fresh_1 = 0.125 / 67, 1.125 / 4, 1.125 / 4, 2.125 / 10
    expected = np.full((4, 16), rare)
    expected[:, 0] = fresh_0, after_0, after_0, 1.125 / 3
    expected[:, 1] = fresh_1, fresh_1, fresh_1, 0.125 / 3
    expected[:, 5] = fresh_1, fresh_1, fresh_1, 0.125 / 3
    found = scores(predictor, BATCH)
    assert found.shape == (2, 4, 1, 1, 16)
    np.testing.assert_allclose(found[0, :, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(found[1, 0, 0, 0], expected[0], rtol=1e-5)


def test_the_stepper_by_hand():
    stepper = fitted(BATCH).stepper()
    for expert in (0, 0, 1):
        stepper.observe_token(7)
        np.testing.assert_allclose(stepper.scores()[0, [0, 1, 5]], [1.125 / 4, 2.125 / 10, 2.125 / 10], rtol=1e-5)
        stepper.observe_layer(0, [expert])
        assert np.isnan(stepper.scores()).all()
    stepper.observe_token(7)
    np.testing.assert_allclose(stepper.scores()[0, [0, 1, 5]], [1.125 / 3, 0.125 / 3, 0.125 / 3], rtol=1e-5)


def test_the_profile_by_hand():
    profile = fitted(BATCH).profile()
    assert profile.popularity.dtype == profile.hazard.dtype == np.float64
    np.testing.assert_allclose(profile.popularity[0, [0, 1, 2, 5]], np.array([49, 17, 1, 17]) / 96, rtol=1e-15)
    expected = np.full((AGES, RATES), 0.125 / 2)
    for cell, trials in TRIALS.items():
        expected[cell] = (USES.get(cell, 0) + 0.125) / (trials + 2)
    np.testing.assert_allclose(profile.hazard, expected, rtol=1e-15)


def test_without_counts_every_expert_is_equally_likely():
    np.testing.assert_allclose(scores(fitted(), BATCH), 1 / 16, rtol=1e-6)
    assert (fitted().profile().hazard == 1 / 16).all()


def test_a_bucket_that_always_or_never_came_true_has_finite_logits():
    predictor = fitted(BATCH)
    predictor.trials += 10**15
    predictor.uses[1:] += 10**15
    with torch.inference_mode():
        assert predictor(BATCH).isfinite().all()


def buckets(predictor: History, batch: Batch) -> np.ndarray:
    """``(T, L, E)`` of the first sequence."""
    return torch.stack(list(predictor._buckets(batch.targets(predictor.geometry.num_experts))))[:, 0].numpy()


def test_ages_by_hand():
    found = buckets(fitted(), batch_of([0] + [1] * 35))[:, 0, :3] // RATES
    assert found[:, 0].tolist() == [0, 1, 2, 3, 3, *[4] * 4, *[5] * 8, *[6] * 16, 7, 7, 7]
    assert found[:, 1].tolist() == [0, 0] + [1] * 34
    assert found[:, 2].tolist() == [0] * 36


def test_rates_begin_where_their_buckets_do():
    edges = torch.tensor(RATE_EDGES, dtype=torch.float64)  # before anything is used, the popularity is the rate
    assert _Past((7,), edges * (1 + 1e-12)).buckets().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert _Past((7,), edges * (1 - 1e-12)).buckets().tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (1, 1, 1, 1)], ids=str)
def test_counts_are_those_of_plain_arithmetic(sizes: tuple[int, ...]):
    traces = [random_trace(f"s{i}", LONG - 9 * i, i) for i in range(4)]
    predictor = History(TINY, TINY_VOCAB)
    layers, experts, top_k = TINY.shape()
    trials, uses = np.zeros((2, AGES, RATES), int)
    counts, tokens, done = np.zeros((layers, experts)), 0, 0
    for size in sizes:
        batch, done = traces[done : done + size], done + size
        predictor.partial_fit(collate(batch))
        for trace in batch:
            tokens += len(trace)
            for chosen in trace.experts:
                np.add.at(counts, (np.arange(layers)[:, None], chosen), 1)
        for trace in batch:
            for layer in range(layers):
                for expert in range(experts):
                    age, weight, count = 0, 0.0, 0.0
                    for chosen in trace.experts[:, layer]:
                        popularity = (counts[layer, expert] + top_k / experts) / (tokens + 1)
                        rate = (PRIOR * popularity + count) / (PRIOR + weight)
                        cell = sum(edge <= age for edge in AGE_EDGES), sum(edge <= rate for edge in RATE_EDGES)
                        used = expert in chosen
                        trials[cell] += 1
                        uses[cell] += used
                        count, weight = DECAY * count + used, DECAY * weight + 1
                        age = 1 if used else age + (age > 0)
    assert predictor.trials.tolist() == trials.tolist()
    assert predictor.uses.tolist() == uses.tolist()
    assert (trials > 0).sum() > 12


def test_a_later_piece_has_no_past():
    first = fitted(BATCH)
    piece = replace(BATCH, starts=(256, 0))
    assert np.array_equal(scores(first, piece), scores(first, BATCH))
    assert torch.equal(fitted(piece).trials, first.trials)


def test_weights_of_another_shape_do_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for counts"):
        History(TINY, TINY_VOCAB).load_state_dict(fitted(BATCH).state_dict())
