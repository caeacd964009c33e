"""What a decoding loop may get wrong is refused in one line, before a stepper's state changes."""

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import HIDDEN, VARIANTS, Variant, fitted_once, random_trace

from moe_beyond.errors import UserError
from moe_beyond.predictors.stepper import Stepper

LAYERS, EXPERTS, TOP_K = TINY.shape()
CAUSAL = [variant for variant in VARIANTS if "later ids" not in variant.reads]
every = pytest.mark.parametrize("variant", CAUSAL, ids=str)


def refused(stepper: Stepper, call: str, *arguments: object) -> str:
    """The one line that a call is refused with, which must leave the scores as they were."""
    before = stepper.scores().copy()
    with pytest.raises(UserError) as error:
        getattr(stepper, call)(*arguments)
    np.testing.assert_array_equal(stepper.scores(), before)
    line = str(error.value)
    assert "\n" not in line
    return line


@every
def test_calls_out_of_order_are_refused_and_change_nothing(variant: Variant) -> None:
    stepper, plain = fitted_once(variant).stepper(), fitted_once(variant).stepper()
    trace = random_trace("a", 3, 0)
    ids = trace.experts
    assert "call observe_token first" in refused(stepper, "observe_layer", 0, ids[0, 0])
    assert "call observe_layer first" in refused(stepper, "observe_computed", LAYERS - 1)
    for token in range(3):
        for each in (stepper, plain):
            each.observe_token(int(trace.token_ids[token]))
        for layer in range(LAYERS):
            wrong = (layer + 1) % LAYERS
            assert f"layer {layer} is next (got layer {wrong})" in refused(stepper, "observe_layer", wrong, ids[0, 0])
            refused(stepper, "observe_layer", layer - LAYERS, ids[0, 0])
            if layer:
                assert f"layer {layer} of the token before is not" in refused(stepper, "observe_token", 0)
            before = f"layer {layer - 1} was observed last (got layer {layer})" if layer else "call observe_layer first"
            assert before in refused(stepper, "observe_computed", layer)
            for each in (stepper, plain):
                each.observe_layer(layer, ids[token, layer])
                each.observe_computed(layer)
            assert f"layer {layer} is observed as computed already" in refused(stepper, "observe_computed", layer)
        assert "call observe_token for the next one" in refused(stepper, "observe_layer", LAYERS, ids[0, 0])
        assert "(got layer 0)" in refused(stepper, "observe_layer", 0, ids[0, 0])
    np.testing.assert_array_equal(stepper.scores(), plain.scores())  # as if nothing wrong had been tried
    stepper.reset()
    assert "call observe_token first" in refused(stepper, "observe_layer", 0, ids[0, 0])


@every
@pytest.mark.parametrize(
    ("experts", "line"),
    [
        ([0, EXPERTS], f"expert {EXPERTS} is not in 0..{EXPERTS - 1}"),
        ([-1, 0], "expert -1 is not in"),
        (np.array([255, 0], np.uint8), "expert 255 is not in"),
        (list(range(TOP_K + 1)), f"a token has at most {TOP_K} experts in a layer (got {TOP_K + 1})"),
        ([3, 3], "an expert is repeated (got [3, 3])"),
        ([[0, 1]], "experts must have shape (n,), the ids of one layer (got (1, 2))"),
        (3, "experts must have shape (n,), the ids of one layer (got ())"),
        ([0.0, 1.0], "not whole numbers (got float64)"),
        ([True, False], "not whole numbers (got bool)"),
        (["a"], "not whole numbers"),
        ([[0], [0, 1]], "not an array of whole numbers"),
    ],
)
def test_experts_that_cannot_be_are_refused(variant: Variant, experts: object, line: str) -> None:
    stepper = fitted_once(variant).stepper()
    stepper.observe_token(0)
    assert line in refused(stepper, "observe_layer", 0, experts)
    stepper.observe_layer(0, [1])  # fewer than K are right, and the layer is still the next one


@every
def test_token_ids_that_cannot_be_are_refused(variant: Variant) -> None:
    predictor = fitted_once(variant)
    stepper = predictor.stepper()
    assert "a token id must be a whole number (got 1.5)" in refused(stepper, "observe_token", 1.5)
    assert "a token id must be a whole number (got '1')" in refused(stepper, "observe_token", "1")
    if predictor.information.token_ids:
        for wrong in (VOCAB, 10**6, -1):
            assert f"token id {wrong} is not in 0..{VOCAB - 1}" in refused(stepper, "observe_token", wrong)
    for right in (np.int32(3), torch.tensor(3)):
        stepper.observe_token(right)
        stepper.reset()


@every
def test_a_prefix_of_another_shape_is_refused(variant: Variant) -> None:
    stepper = fitted_once(variant).stepper()
    trace = random_trace("a", 4, 0)
    for ids, experts in (
        (trace.token_ids, trace.experts[:3]),
        (trace.token_ids, trace.experts[:, :2]),
        (trace.token_ids, trace.experts[0]),
        (trace.token_ids[None], trace.experts),
    ):
        assert f"pass (T,) and (T, {LAYERS}, {TOP_K})" in refused(stepper, "observe_tokens", ids, experts)
    stepper.observe_tokens([], [])


@pytest.mark.parametrize("variant", [v for v in CAUSAL if "own states" in v.reads], ids=str)
def test_states_that_cannot_be_are_refused(variant: Variant) -> None:
    predictor = fitted_once(variant)
    stepper, right = predictor.stepper(), np.linspace(-1, 1, HIDDEN, dtype=np.float16)
    computed = predictor.information.hidden_states == ("layer_inputs",)
    stepper.observe_token(0)
    if computed:
        stepper.observe_layer(0, [0, 1], right[:-1])  # which it does not read
    words: tuple[object, ...] = ("observe_computed", 0) if computed else ("observe_layer", 0, [0, 1])
    for wrong, line in (
        (right[:-1], f"must have shape ({HIDDEN},), as in training (got ({HIDDEN - 1},))"),
        (right[None], f"must have shape ({HIDDEN},), as in training (got (1, {HIDDEN}))"),
        (np.where(right > 0.9, np.nan, right), "is not finite"),
        (np.where(right > 0.9, np.inf, right), "is not finite"),
        (np.where(right > 0.9, np.float64(1e300), right), "is not finite in float16"),
        (np.where(right > 0.9, np.float64(7e4), right), "is not finite in float16"),
        (["a"] * HIDDEN, "is not an array of numbers"),
    ):
        said = refused(stepper, *words, wrong)
        assert said.startswith(f"{words[0]}: the hidden state ")
        assert line in said
    getattr(stepper, str(words[0]))(*words[1:], right)
