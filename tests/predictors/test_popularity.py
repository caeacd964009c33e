import numpy as np
import pytest
import torch
from _helpers.common import TINY
from _helpers.common import VOCAB as TINY_VOCAB
from _helpers.predictor_variants import LONG, random_trace

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.traces.trace import Trace
from moe_beyond.usage_profile import default_hazard

SMALL = Geometry("small", (0, 1), num_experts=4, top_k=2, params_per_expert=1, other_params_per_layer=1)
VOCAB = 10


def batch_of(*sequences: list[list[list[int]]]) -> Batch:
    """Sequences of tokens' experts by layer."""
    traces = []
    for number, experts in enumerate(sequences):
        ids = np.arange(len(experts), dtype=np.int32)
        traces.append(Trace(f"s{number}", "tests", ids, np.array(experts, np.uint8), len(experts)))
    return collate(traces)


# Four tokens in sequences of different length: expert 0 of layer 0 is chosen by three of them, and so on.
COUNTED = batch_of([[[0, 1], [2, 3]], [[3, 1], [0, 1]], [[1, 0], [2, 1]]], [[[2, 0], [2, 0]]])
# With an imaginary token that chose each of 4 experts with probability K/E = 1/2.
PROFILE = [[3.5 / 5, 3.5 / 5, 1.5 / 5, 1.5 / 5], [2.5 / 5, 2.5 / 5, 3.5 / 5, 1.5 / 5]]


def counted(*batches: Batch) -> Popularity:
    predictor = Popularity(SMALL, VOCAB)
    for batch in batches:
        predictor.partial_fit(batch)
    return predictor.eval()


def test_counts_are_exact_and_padding_is_not_counted():
    predictor = counted(COUNTED)
    assert predictor.counts.tolist() == [[3, 3, 1, 1], [2, 2, 3, 1]]
    assert predictor.tokens.tolist() == 4


def test_probabilities_by_hand_are_the_same_for_every_token():
    predictor = counted(COUNTED)
    with torch.inference_mode():
        scores = predictor.probabilities(predictor(COUNTED))
    assert scores.shape == (2, 3, 1, 2, 4)
    np.testing.assert_allclose(scores, np.broadcast_to(PROFILE, scores.shape), rtol=1e-6)


def test_the_profile_by_hand():
    profile = counted(COUNTED).profile()
    assert profile.popularity.dtype == np.float64
    np.testing.assert_allclose(profile.popularity, PROFILE, rtol=1e-15)
    np.testing.assert_allclose(profile.popularity.sum(1), 2)  # K
    assert np.array_equal(profile.hazard, default_hazard())  # it counts none of its own


def test_without_counts_every_expert_is_equally_likely():
    assert counted().profile().popularity.tolist() == [[0.5] * 4] * 2


def test_an_expert_that_always_and_one_that_never_came_have_finite_logits():
    predictor = counted(batch_of([[[0, 1], [0, 1]]] * 1000))
    predictor.counts *= 10**9
    predictor.tokens *= 10**9
    with torch.inference_mode():
        assert predictor(COUNTED).isfinite().all()
    np.testing.assert_allclose(predictor.profile().popularity, [[1, 1, 0, 0]] * 2, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_counts_do_not_depend_on_the_batches(cut: int):
    traces = [random_trace(f"s{i}", LONG - i, i) for i in range(4)]
    whole, parts = (Popularity(TINY, TINY_VOCAB) for _ in range(2))
    whole.partial_fit(collate(traces))
    for part in (traces[:cut], traces[cut:]):
        parts.partial_fit(collate(part))
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.tokens, parts.tokens)


def test_weights_of_another_shape_do_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for counts"):
        Popularity(TINY, VOCAB).load_state_dict(counted(COUNTED).state_dict())
