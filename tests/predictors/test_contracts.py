"""What holds for every registered predictor: stepping equals the batch, and no score knows more than it declares."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB, with_holes
from _helpers.predictor_variants import (
    HIDDEN,
    LONG,
    SEEN,
    VARIANTS,
    WIDE,
    Variant,
    fitted_once,
    probabilities,
    random_trace,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.registry import ARCHITECTURES, create
from moe_beyond.testing import check_predictor
from moe_beyond.testing.predictors import STEP_TOLERANCE, assert_steps, check_information_set
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.trace import Trace

LAYERS, EXPERTS, TOP_K = TINY.shape()
CAUSAL = [variant for variant in VARIANTS if "later ids" not in variant.reads]
BY_GRADIENT = [v for v in VARIANTS if issubclass(ARCHITECTURES[v.architecture], GradientPredictor)]


def every(variants: list[Variant]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", variants, ids=str)


def test_the_variants_cover_the_registry():
    assert {variant.architecture for variant in VARIANTS} == set(ARCHITECTURES)


@pytest.mark.parametrize("geometry", [TINY, WIDE], ids=lambda g: g.model)
@every(VARIANTS)
def test_the_contract(variant, geometry):
    check_predictor(fitted_once(variant, geometry))


@pytest.mark.parametrize("geometry", [TINY, WIDE], ids=lambda g: g.model)
@every(VARIANTS)
def test_logits_have_a_slice_a_lookahead(variant, geometry):
    predictor = fitted_once(variant, geometry)
    batch = collate([random_trace("a", 5, 0, geometry), random_trace("b", 3, 1, geometry)])
    with torch.inference_mode():
        logits = predictor(batch)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 5, len(predictor.information.lookaheads), geometry.num_layers, geometry.num_experts)
    scores = predictor.probabilities(logits)[batch.mask]
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores.std() > 0.05 * scores.mean()  # the tests below would see nothing in constant scores


@every(VARIANTS)
def test_what_reads_token_ids_says_so(variant):
    reads = bool(variant.reads & {"own id", "earlier ids", "later ids"})
    assert fitted_once(variant).information.token_ids == reads


@every(VARIANTS)
def test_what_reads_hidden_states_says_so(variant):
    assert bool(fitted_once(variant).information.hidden_states) == ("own states" in variant.reads)


@every(VARIANTS)
def test_arguments_rebuild_the_predictor(variant):
    predictor = fitted_once(variant)
    arguments = json.loads(json.dumps(predictor.arguments()))
    twin = create(variant.architecture, TINY, VOCAB, **arguments)
    twin.load_state_dict(predictor.state_dict())
    batch = collate([random_trace("a", 9, 0)])
    assert arguments.items() >= variant.arguments.items()
    assert twin.information == predictor.information
    assert np.array_equal(probabilities(twin.eval(), batch), probabilities(predictor, batch))


@pytest.mark.parametrize("geometry", [TINY, WIDE], ids=lambda g: g.model)
@every(CAUSAL)
def test_stepping_equals_the_batch(variant, geometry):
    predictor = fitted_once(variant, geometry)
    trace = random_trace("a", LONG if geometry == TINY else 8, 0, geometry)
    scores = probabilities(predictor, collate([trace]))[0]
    assert_steps(predictor.stepper(), trace, scores, predictor)


@pytest.mark.parametrize("geometry", [TINY, WIDE], ids=lambda g: g.model)
@every(VARIANTS)
def test_slots_without_an_expert(variant, geometry):
    """Scores and loss do not depend on which slots those are, and stepping, which knows none, equals the batch."""
    predictor, rng = fitted_once(variant, geometry), np.random.default_rng(0)
    trace = random_trace("a", LONG if geometry == TINY else 8, 0, geometry)
    trace = replace(trace, experts=with_holes(trace.experts, rng, 0.4))
    other = replace(trace, experts=rng.permuted(trace.experts, axis=-1))
    assert not np.array_equal(trace.experts, other.experts)
    batch, others = collate([trace]), collate([other])
    scores = probabilities(predictor, batch)[0]
    np.testing.assert_allclose(probabilities(predictor, others)[0], scores, rtol=0, atol=1e-6)
    if variant in CAUSAL:
        assert_steps(predictor.stepper(), trace, scores, predictor)
        stepper, last = predictor.stepper(), len(trace) - 2
        stepper.observe_tokens(trace.token_ids[:last], trace.experts[:last])
        assert_steps(stepper, trace, scores, predictor, first=last)
    if isinstance(predictor, GradientPredictor):
        with torch.inference_mode():
            loss, other_loss = (predictor.loss(predictor(b), b) for b in (batch, others))
        assert torch.isfinite(loss)
        torch.testing.assert_close(loss, other_loss)


@every(CAUSAL)
def test_stepping_one_layer_models(variant):
    geometry = replace(TINY, moe_layers=(3,))
    predictor = fitted_once(variant, geometry)
    trace = random_trace("a", 6, 0, geometry)
    scores = probabilities(predictor, collate([trace]))[0]
    assert_steps(predictor.stepper(), trace, scores, predictor)


@every(CAUSAL)
def test_stepping_equals_the_batch_calibrated(variant):
    predictor, trace = copy.copy(fitted_once(variant)), random_trace("a", 7, 0)
    plain = probabilities(predictor, collate([trace]))[0]
    shape = (len(predictor.information.lookaheads), LAYERS)
    generator = torch.Generator().manual_seed(0)
    predictor.calibration = Calibration(
        0.5 + torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    )
    scores = probabilities(predictor, collate([trace]))[0]
    assert not np.allclose(scores, plain)
    assert_steps(predictor.stepper(), trace, scores, predictor)


@every(CAUSAL)
def test_reset_forgets_the_sequence(variant):
    predictor = fitted_once(variant)
    stepper = predictor.stepper()
    earlier, trace = random_trace("a", 7, 1), random_trace("b", 9, 2)
    stepper.observe_tokens(earlier.token_ids, earlier.experts)
    stepper.observe_token(3)  # also in the middle of a token
    stepper.observe_layer(0, trace.experts[0, 0])
    stepper.reset()
    assert np.isnan(stepper.scores()).all()
    assert_steps(stepper, trace, probabilities(predictor, collate([trace]))[0], predictor)


@every(CAUSAL)
@settings(max_examples=10, deadline=None)
@given(prefix=st.integers(0, LONG - 4), seed=st.integers(0, 5))
def test_a_prefix_at_once_equals_its_tokens_one_by_one(variant, prefix, seed):
    predictor = fitted_once(variant)
    trace = random_trace("a", prefix + 2, seed)
    stepper = predictor.stepper()
    stepper.observe_tokens(trace.token_ids[:prefix], trace.experts[:prefix])
    # Every layer of its last token is routed.
    assert np.isnan(stepper.scores()).all() == (prefix == 0 or "next" not in predictor.information.lookaheads)
    scores = probabilities(predictor, collate([trace]))[0]
    assert_steps(stepper, trace, scores, predictor, first=prefix)


@every(CAUSAL)
def test_steppers_of_one_predictor_do_not_disturb_each_other(variant):
    predictor = fitted_once(variant)
    trace, other = random_trace("a", 6, 1), random_trace("b", 6, 2)
    stepper, second = predictor.stepper(), predictor.stepper()
    scores = probabilities(predictor, collate([trace]))[0]
    for token in range(len(trace) - 1):
        assert_steps(stepper, trace, scores, predictor, token, token + 1)
        second.observe_tokens(other.token_ids[token : token + 1], other.experts[token : token + 1])


@every(CAUSAL)
def test_scores_once_handed_out_stay_as_they_were(variant):
    stepper = fitted_once(variant).stepper()
    trace = random_trace("a", 2, 0)
    handed_out = []
    for token in range(2):
        stepper.observe_token(int(trace.token_ids[token]))
        handed_out.append((stepper.scores(), stepper.scores().copy()))
        for layer in range(LAYERS):
            stepper.observe_layer(layer, trace.experts[token, layer])
            handed_out.append((stepper.scores(), stepper.scores().copy()))
    for scores, copied in handed_out:
        np.testing.assert_array_equal(scores, copied)


@every([variant for variant in VARIANTS if variant not in CAUSAL])
def test_what_sees_later_tokens_has_no_stepper(variant):
    predictor = fitted_once(variant)
    assert not predictor.information.causal
    with pytest.raises(UserError, match="later tokens"):
        predictor.stepper()


def changed_ids(trace: Trace, tokens: slice, shift: int, vocab: int = VOCAB) -> Trace:
    token_ids = trace.token_ids.copy()
    token_ids[tokens] = (token_ids[tokens] + shift) % vocab
    return replace(trace, token_ids=token_ids)


def changed_experts(trace: Trace, tokens: slice, layers: slice, shift: int) -> Trace:
    experts = trace.experts.copy()
    experts[tokens, layers] = (experts[tokens, layers] + shift) % EXPERTS
    return replace(trace, experts=experts)


positions = st.integers(1, LONG - 2)
# A shift of half the experts maps {0, 4} to itself.
shifts = st.integers(1, EXPERTS // 2 - 1)


@every(VARIANTS)
@settings(max_examples=15, deadline=None)
@given(at=positions, shift=shifts, seed=st.integers(0, 5))
def test_nothing_outside_the_information_set_moves_a_score(variant, at, shift, seed):
    check_information_set(fitted_once(variant), random_trace("a", LONG, seed), at, shift)


def one_state(trace: Trace, token: int, layer: int, shift: int) -> Trace:
    """Change the hidden states that come with one layer of a token."""
    router, inputs = trace.hidden_states.router_inputs.copy(), trace.hidden_states.layer_inputs.copy()
    router[token, layer] += shift * np.linspace(1, 2, HIDDEN, dtype=np.float16)
    inputs[token, layer + 1 : layer + 2] += shift * np.linspace(1, 2, HIDDEN, dtype=np.float16)
    return replace(trace, hidden_states=HiddenStates(router, inputs))


def movements(variant: Variant, at: int, shift: int, seed: int) -> dict[str, np.ndarray]:
    """Return the change ``(H, L)`` of the scores of token ``at`` with each input."""
    predictor = fitted_once(variant)
    trace = random_trace("a", LONG, seed, vocab=SEEN)  # a predictor need not tell unseen ids apart
    before = probabilities(predictor, collate([trace]))[0]
    own, previous, following = slice(at, at + 1), slice(at - 1, at), slice(at + 1, at + 2)

    def moved(altered: Trace) -> np.ndarray:
        return np.abs(probabilities(predictor, collate([altered]))[0] - before)[at].max(-1)

    # A score of lookahead h for layer l reads layer l - h, and "computed" layer l - 1: change that layer if it exists.
    behind = [1 if h == "computed" else h for h in predictor.information.lookaheads]
    of_layers = [moved(changed_experts(trace, own, slice(routed, routed + 1), shift)) for routed in range(LAYERS)]
    nearest = [
        [of_layers[layer - h][index, layer] if isinstance(h, int) and layer >= h else np.nan for layer in range(LAYERS)]
        for index, h in enumerate(behind)
    ]
    states_moved = [moved(one_state(trace, at, layer, shift)) for layer in range(LAYERS)]
    of_states = [
        [states_moved[layer - h][index, layer] if isinstance(h, int) and layer >= h else np.nan
         for layer in range(LAYERS)]
        for index, h in enumerate(behind)
    ]  # fmt: skip
    told_before = np.array([h == "next" for h in predictor.information.lookaheads])[:, None]
    return {
        "own id": np.where(told_before, np.nan, moved(changed_ids(trace, own, shift, SEEN))),
        "earlier ids": moved(changed_ids(trace, previous, shift, SEEN)),
        "earlier experts": moved(changed_experts(trace, previous, slice(None), shift)),
        "earlier layers": np.array(nearest),
        "own states": np.array(of_states),
        "later ids": moved(changed_ids(trace, following, shift, SEEN)),
    }


@every(VARIANTS)
@settings(max_examples=10, deadline=None)
@given(at=positions, shift=shifts, seed=st.integers(0, 5))
def test_scores_move_with_what_is_read_and_nothing_else(variant, at, shift, seed):
    """The counterpart of the test above, which a predictor that reads nothing would pass."""
    for name, moved in movements(variant, at, shift, seed).items():
        exists = ~np.isnan(moved)
        if name not in variant.reads:
            assert (moved[exists] <= 1e-6).all(), name
        elif not variant.jumps:
            assert (moved[exists] > 1e-5).all(), name


@every([variant for variant in VARIANTS if variant.jumps])
def test_scores_that_jump_do_so_with_all_that_is_read(variant):
    """The test above requires this for every change; here some changes suffice, for every lookahead and layer."""
    changes = [movements(variant, at, 1, seed) for at in range(1, 9) for seed in range(6)]
    for name in variant.reads:
        farthest = np.max([change[name] for change in changes], 0)
        assert (farthest[~np.isnan(farthest)] > 1e-5).all(), name


@every(VARIANTS)
def test_padding_changes_nothing(variant):
    predictor = fitted_once(variant)
    traces = [random_trace(f"s{length}", length, length) for length in (1, LONG, 3, 17, 4, 35)]
    together = probabilities(predictor, collate(traces))
    for row, trace in enumerate(traces):
        alone = probabilities(predictor, collate([trace]))[0]
        np.testing.assert_allclose(together[row, : len(trace)], alone, rtol=0, atol=STEP_TOLERANCE)


@every(VARIANTS)
def test_the_order_of_a_batch_does_not_matter(variant):
    predictor = fitted_once(variant)
    traces = [random_trace(f"s{length}", length, length) for length in (5, LONG, 1, 18)]
    forwards = probabilities(predictor, collate(traces))
    backwards = probabilities(predictor, collate(traces[::-1]))[::-1]
    for row, trace in enumerate(traces):
        length = len(trace)
        np.testing.assert_allclose(backwards[row, :length], forwards[row, :length], rtol=0, atol=STEP_TOLERANCE)


# A window of one token leaves nothing to weigh, and so no gradient to some weights.
@every([variant for variant in BY_GRADIENT if "earlier ids" in variant.reads])
def test_the_loss_is_finite_and_reaches_every_weight(variant):
    torch.manual_seed(0)
    predictor = copy.deepcopy(fitted_once(variant)).train()
    assert isinstance(predictor, GradientPredictor)
    batch = collate([random_trace("a", 9, 0, vocab=3), random_trace("b", 4, 1)])  # ids that recur, and others
    loss = predictor.loss(predictor(batch), batch)
    gradients = torch.autograd.grad(loss, list(predictor.parameters()))
    assert loss.shape == ()
    for (name, _), gradient in zip(predictor.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@every(BY_GRADIENT)
def test_the_loss_is_a_mean_over_real_tokens(variant):
    predictor = fitted_once(variant)
    assert isinstance(predictor, GradientPredictor)
    traces = [random_trace("a", 4, 0), random_trace("b", 9, 1)]
    with torch.inference_mode():
        together, first, second = (
            float(predictor.loss(predictor(batch), batch))
            for batch in (collate(traces), collate(traces[:1]), collate(traces[1:]))
        )
    assert together == pytest.approx((4 * first + 9 * second) / 13, rel=1e-5)
