"""naive_bayes against sums worked out one expert at a time."""

import math

import numpy as np
import pytest
import torch
from _helpers.common import VOCAB
from _helpers.predictor_variants import random_trace, training_stats

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.naive_bayes import NaiveBayes
from moe_beyond.predictors.batch import collate

SMALL = Geometry("small", (0, 1, 2), num_experts=5, top_k=2, params_per_expert=1, other_params_per_layer=1)
TRAINED = [random_trace(f"s{i}", 9, i, SMALL) for i in range(3)]


def fitted(**arguments) -> NaiveBayes:
    predictor = NaiveBayes(SMALL, VOCAB, **arguments)
    predictor.prepare(training_stats(TRAINED))
    for trace in TRAINED:  # in several batches
        predictor.partial_fit(collate([trace]))
    return predictor.eval()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(("lookaheads", "sources"), [(1, 1), (2, 1), (2, 2), (3, 4)])
def test_what_layers_add(lookaheads, sources):
    predictor = fitted(lookaheads=lookaheads, sources=sources, token=0.0, history=0.0, layers=0.25, smoothing=3.0)
    test = random_trace("test", 2, 99, SMALL)
    with torch.inference_mode():
        found = predictor(collate([test]))[0].numpy()
    every = np.concatenate([trace.experts for trace in TRAINED])
    tokens = len(every)

    def used(layer, *experts):
        return sum(all(e in row for e in experts) for row in every[:, layer].tolist())

    def both(one, f, other, e):
        return sum(f in row[one] and e in row[other] for row in every.tolist())

    for token in range(2):
        for ahead in range(1, lookaheads + 1):
            for layer in range(3):
                for e in range(5):
                    popular = (used(layer, e) + 2 / 5) / (tokens + 1)
                    expected = logit(popular)
                    for source in range(layer - ahead, layer - ahead - sources, -1):
                        for f in test.experts[token, source].tolist() if source >= 0 else ():
                            share = (both(source, f, layer, e) + 3 * popular) / (used(source, f) + 3)
                            expected += 0.25 * math.log(share / popular)
                    assert found[token, ahead - 1, layer, e] == pytest.approx(expected, abs=1e-4)


def test_token_and_history_are_weighted_log_odds():
    test = collate([random_trace("test", 6, 99, SMALL)])
    weights = ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.25))
    *parts, neither, mixed = (fitted(lookaheads=1, token=t, history=h, layers=0.0) for t, h in weights)
    with torch.inference_mode():
        token, history = (part(test) for part in parts)
        popular = neither(test)
        np.testing.assert_allclose(token[:, :, 0], parts[0].table(test)[:, :, 0], atol=1e-5)
        np.testing.assert_allclose(history[:, :, 0], parts[1].past(test)[:, :, 0], atol=1e-5)
        expected = popular + 0.5 * (token - popular) + 0.25 * (history - popular)
        np.testing.assert_allclose(mixed(test), expected, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(UserError, match=r"naive_bayes: lookaheads must be a whole number within 1\.\.10000"):
        NaiveBayes(SMALL, VOCAB, lookaheads=0)
    with pytest.raises(UserError, match="naive_bayes: smoothing must be a finite number above 0"):
        NaiveBayes(SMALL, VOCAB, smoothing=0.0)
