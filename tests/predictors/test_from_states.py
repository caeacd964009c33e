"""Predictors that read hidden states, checked by hand and through the command line."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from _helpers.common import FULL, TINY, VOCAB, error_line, plain_routers, plain_states, projected_traces, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, fit
from _helpers.predictor_variants import (
    HIDDEN,
    Variant,
    fitted,
    probabilities,
    random_projection,
    random_trace,
    training_stats,
)

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.layer_mlp import LayerMlp
from moe_beyond.predictors.architectures.next_gate import NextGate
from moe_beyond.predictors.architectures.pre_attention import PreAttention
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import check_fits, read_config, read_predictor
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.testing import check_predictor
from moe_beyond.testing.predictors import layer_input, router_input
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.trace import Trace

LAYERS, EXPERTS, TOP_K = TINY.shape()


def with_plain_states(name="a", length=6):
    trace = random_trace(name, length, 0)
    return Trace(
        name, "tests", trace.token_ids, trace.experts, length, hidden_states=plain_states(trace.experts, EXPERTS)
    )


def text_of(routers):
    counted = training_stats([random_trace("a", 5, 0)])
    return TrainingStats(counted.token_counts, counted.token_strings, counted.expert_counts, counted.prefixes, routers)


def test_next_gate_lets_each_router_read_what_an_earlier_one_read():
    predictor, trace = NextGate(TINY, VOCAB, EXPERTS, lookaheads=2), with_plain_states()
    predictor.prepare(text_of(plain_routers(TINY)))
    predictor.partial_fit(collate([trace]))
    logits = predictor(collate([trace]))[0]
    for ahead in (1, 2):
        found = logits[:, ahead - 1, ahead:].topk(TOP_K, dim=-1).indices.sort(-1).values
        earlier = np.sort(trace.experts[:, : LAYERS - ahead], axis=-1)
        np.testing.assert_array_equal(found, earlier)
        # Before there is anything to read: how often each was chosen, as log-odds.
        share = ((trace.experts[:, 0] == 3).sum() + TOP_K / EXPERTS) / (len(trace) + 1)
        np.testing.assert_allclose(logits[:, ahead - 1, 0, 3], math.log(share / (1 - share)), rtol=1e-5)


def test_next_gate_scores_a_layer_without_selection_bias_as_the_others():
    weight, bias = np.random.default_rng(0).normal(size=(2, LAYERS, EXPERTS, EXPERTS)).astype(np.float32)
    bias[1] = 0
    predictor, trace = NextGate(TINY, VOCAB, EXPERTS, lookaheads=1), with_plain_states()
    predictor.prepare(text_of(Routers(weight, "sigmoid", selection_bias=bias[:, 0])))
    predictor.partial_fit(collate([trace]))
    expected = predictor.probabilities(predictor(collate([trace])))[0, 0, 0]
    stepper = predictor.stepper()
    stepper.observe_token(0)
    stepper.observe_layer(0, trace.experts[0, 0], trace.hidden_states.router_inputs[0, 0])
    np.testing.assert_allclose(stepper.scores()[1], expected[1], atol=1e-6)


def test_next_gate_adds_a_selection_bias_to_what_the_scoring_makes():
    weight = np.zeros((LAYERS, EXPERTS, EXPERTS), np.float32)
    bias = np.tile(np.arange(EXPERTS, dtype=np.float32), (LAYERS, 1))
    predictor, trace = NextGate(TINY, VOCAB, EXPERTS), with_plain_states()
    predictor.prepare(text_of(Routers(weight, "sigmoid", bias=-bias, selection_bias=bias / 8)))
    logits = predictor(collate([trace]))[0, 0, 0]
    expected = 1 / (1 + np.exp(np.arange(EXPERTS))) + np.arange(EXPERTS) / 8
    np.testing.assert_allclose(logits[1], expected, rtol=1e-5)


def test_next_gate_asks_for_routers_and_all_for_states():
    with pytest.raises(UserError, match="next_gate reads the model's routers, and the traces have none"):
        NextGate(TINY, VOCAB, EXPERTS).prepare(text_of(None))
    with pytest.raises(UserError, match="next_gate reads hidden states, and the traces have none; collect them"):
        NextGate(TINY, VOCAB, None)
    with pytest.raises(UserError, match=r"next_gate: lookaheads must be a whole number within 1\.\.10000"):
        NextGate(TINY, VOCAB, EXPERTS, lookaheads=0)


def test_states_of_another_width_are_refused(tmp_path):
    manifest = tiny_traces(tmp_path / "traces", hidden_states=True).manifest
    with pytest.raises(UserError, match=f"its hidden states have width {EXPERTS}, .* was fitted for {EXPERTS + 1}"):
        check_fits(PreAttention(TINY, VOCAB, EXPERTS + 1), manifest, "traces")


READERS = {"layer_mlp": LayerMlp, "pre_attention": PreAttention}


@pytest.mark.parametrize("predictor_class", READERS.values(), ids=READERS)
def test_predictors_of_projected_states_keep_the_contract(predictor_class):
    check_predictor(predictor_class, projected_from=9, width=8)


@pytest.mark.parametrize("name", READERS)
def test_states_of_the_models_width_are_projected(name):
    """In batches and in steps: the scores are those of states that were projected before."""
    predictor = fitted(Variant(name, "projected", {"hidden_size": EXPERTS, "projected_from": FULL, "width": 8}))
    projection = random_projection(LAYERS, EXPERTS, FULL)
    plain, rng = random_trace("a", 5, 0), np.random.default_rng(0)
    full = HiddenStates(*rng.normal(size=(2, 5, LAYERS, FULL)).astype(np.float16))
    arrays = (
        np.einsum("tld,lwd->tlw", *(array.astype(np.float32) for array in pair)).astype(np.float16)
        for pair in zip(full.arrays().values(), (projection.router_inputs, projection.layer_inputs), strict=True)
    )
    narrow, whole = (replace(plain, hidden_states=states) for states in (HiddenStates(*arrays), full))
    scores = probabilities(predictor, collate([narrow]))[0]
    np.testing.assert_allclose(probabilities(predictor, collate([whole]))[0], scores, atol=2e-3)
    steppers = predictor.stepper(), predictor.stepper()
    for token in range(5):
        for stepper, trace in zip(steppers, (narrow, whole), strict=True):
            stepper.observe_token(int(trace.token_ids[token]))
        for layer in range(LAYERS):
            for stepper, trace in zip(steppers, (narrow, whole), strict=True):
                stepper.observe_layer(layer, trace.experts[token, layer], router_input(trace, token, layer))
                stepper.observe_computed(layer, layer_input(trace, token, layer + 1))
            np.testing.assert_allclose(steppers[1].scores(), steppers[0].scores(), atol=2e-3)
    steppers[0].observe_token(0)
    observe = partial(steppers[0].observe_layer, 0, [0, 1])
    if name == "pre_attention":
        observe()
        observe = partial(steppers[0].observe_computed, 0)
    with pytest.raises(
        UserError, match=rf"must have shape \({EXPERTS},\) or \({FULL},\), as in training \(got \(9,\)\)"
    ):
        observe(np.zeros(9))


def test_a_score_of_the_next_layer_waits_for_computing():
    trace = random_trace("a", 1, 0)
    predictor = fitted(Variant("pre_attention", "default", {"hidden_size": HIDDEN, "width": 8}))
    expected, stepper = probabilities(predictor, collate([trace]))[0, 0, 0], predictor.stepper()
    stepper.observe_token(0)
    np.testing.assert_allclose(stepper.scores()[0], expected[0], atol=1e-6)
    stepper.observe_layer(0, trace.experts[0, 0], router_input(trace, 0, 0))  # which it does not read
    assert np.isnan(stepper.scores()).all()
    stepper.observe_layer(1, trace.experts[0, 1])  # whose score never came
    stepper.observe_computed(1, layer_input(trace, 0, 2))
    np.testing.assert_allclose(stepper.scores()[2], expected[2], atol=1e-6)
    assert np.isnan(stepper.scores()[[0, 1, 3]]).all()
    stepper.observe_layer(2, trace.experts[0, 2])
    stepper.observe_computed(2)  # of an unknown state
    assert np.isnan(stepper.scores()).all()
    stepper.observe_layer(3, trace.experts[0, 3])
    with pytest.raises(UserError, match="no MoE layer follows layer 3, and a state is given; give no state"):
        stepper.observe_computed(3, layer_input(trace, 0, 2))
    stepper.observe_computed(3)
    stepper.observe_token(0)


def test_a_projection_is_fitted_stored_and_compared(tmp_path, capsys):
    traces, projection = projected_traces(tmp_path / "traces")
    words = ["-c", str(CONFIGS / "trainer/default.yaml"), "-c", str(CONFIGS / "model/layer_mlp.yaml")]
    words += ["--model.width=16", "--trainer.max_epochs=1"]
    folder = fit(tmp_path, tmp_path / "traces", *words) / "predictor"
    predictor, config = read_predictor(folder), read_config(folder)
    assert (predictor.hidden_size, predictor.projected_from) == (EXPERTS, FULL)
    np.testing.assert_array_equal(
        predictor.projection_of("router_inputs").matrix, projection.router_inputs.astype(np.float32)
    )
    assert config["training"]["hidden_states"] == f"float16, {EXPERTS} of {FULL} values, all MoE layers"
    assert f"recorded as float16, {EXPERTS} of {FULL} values" in (folder / "README.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--traces", traces.folder, "--budget", "50%", "--quiet"]) == 0
    capsys.readouterr()
    other, _ = projected_traces(tmp_path / "other", seed=5)
    assert error_line(capsys, ["evaluate", folder, "--traces", other.folder]) == (
        f"{other.folder}: its hidden states have another projection than those of the predictor's training text; "
        "collect both sets from the same model"
    )
    some, _ = projected_traces(tmp_path / "some", layers=(1, 3))
    assert error_line(capsys, ["evaluate", folder, "--traces", some.folder]) == (
        f"{some.folder}: has hidden states of 2 of 4 MoE layers, and layer_mlp reads those of all; collect with "
        "--state-layers all"
    )
    plain = f"{tmp_path}/traces-plain"
    assert error_line(capsys, ["evaluate", folder, "--traces", plain]) == (
        f"{plain}: its hidden states have width {EXPERTS}, but the predictor was fitted for {EXPERTS} (projected from "
        f"{FULL})"
    )
    data = ["-c", str(CONFIGS / "data/traces.yaml")]
    for options, says in (
        ([f"--data.traces={traces.folder}", f"--data.val_traces={other.folder}"], "have another projection than"),
        ([f"--data.traces={traces.folder}", f"--data.val_traces={plain}"], f"have width {EXPERTS}, but"),
        (
            [f"--data.traces={plain}", f"--data.val_traces={other.folder}"],
            f"are projected from {FULL} to {EXPERTS} values",
        ),
        ([f"--data.traces={some.folder}"], "has hidden states of 2 of 4 MoE layers"),
    ):
        assert main(["fit", *words, *data, *options]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    gate = ["-c", str(CONFIGS / "trainer/counting.yaml"), "-c", str(CONFIGS / "model/next_gate.yaml")]
    assert main(["fit", *gate, *data, f"--data.traces={traces.folder}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"moe-beyond: error: {traces.folder}: its hidden states are projected from {FULL} to {EXPERTS} values, and "
        "this next_gate reads those of the model; collect without --state-width"
    )


def test_a_predictor_of_projected_states_fits_the_model_and_needs_a_projection():
    predictor = LayerMlp(TINY, VOCAB, EXPERTS, projected_from=FULL)
    manifest = Manifest(TINY, Tokenizer("tests", VOCAB), "tiny", 16.0, "model", "run", "0", hidden_size=FULL)
    check_fits(predictor, manifest, "model")  # whose states the stepper projects
    with pytest.raises(UserError, match=f"have width {FULL + 1}, but the predictor was fitted for {EXPERTS} "):
        check_fits(predictor, replace(manifest, hidden_size=FULL + 1, states=None), "model")
    with pytest.raises(UserError, match="projected_from is given, and the traces are not projected"):
        predictor.prepare(text_of(None))
    assert predictor.projection_of("router_inputs").weights_fault() == "a row of the projection has not length 1"
    with pytest.raises(UserError, match=r"projected_from must exceed hidden_size 8 \(got 8\)"):
        LayerMlp(TINY, VOCAB, EXPERTS, projected_from=EXPERTS)


def test_the_loss_of_pre_attention_by_hand():
    predictor, trace = PreAttention(TINY, VOCAB, EXPERTS), with_plain_states(length=1)
    logits = torch.zeros(1, 1, 1, LAYERS, EXPERTS)
    # All alike: the chosen two weigh 3 and the other six 1/2, each costs log 2; all pairs lack the margin of 0.1.
    expected = (2 * 3 + 6 * 0.5) * math.log(2) + 0.3 * 0.1
    assert float(predictor.loss(logits, collate([trace]))) == pytest.approx(expected)
    logits.scatter_(-1, torch.from_numpy(trace.experts.astype(np.int64))[None, :, None], 1.0)
    expected = 2 * 3 * math.log(1 + math.exp(-1)) + 6 * 0.5 * math.log(2)
    assert float(predictor.loss(logits, collate([trace]))) == pytest.approx(expected)
    with pytest.raises(UserError, match="remove the teachers"):
        predictor.loss(logits, collate([trace]), logits.sigmoid())


@pytest.mark.parametrize("name", ["layer_mlp", "pre_attention"])
def test_it_learns_is_evaluated_and_refuses_traces_without_states(name, tmp_path, capsys):
    """A layer's input determines its experts here; one predictor reads that input, the other an earlier one."""
    traces = tiny_traces(tmp_path / "traces", sequences=40, hidden_states=True)
    configs = str(CONFIGS / "trainer/default.yaml"), str(CONFIGS / f"model/{name}.yaml")
    words = ["-c", configs[0], "-c", configs[1], "--model.width=32"]
    run = fit(tmp_path, tmp_path / "traces", *words, "--trainer.max_epochs=30", "--model.optimizer.lr=0.02")
    capsys.readouterr()
    asked = ["evaluate", str(run / "predictor"), "--traces", traces.folder, "--split", "validation", "--budget", "50%"]
    assert main([*asked, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_layer = [row["recall_at_k"] for row in found["metrics"][0]["by_layer"]]
    assert (min(by_layer[1:]) > 0.98) == (name == "pre_attention"), by_layer
    tiny_traces(tmp_path / "without")
    said = error_line(capsys, ["evaluate", run / "predictor", "--traces", tmp_path / "without"])
    assert said == (
        f"{tmp_path / 'without'}: has no hidden states, which {name} requires; collect with --record "
        "experts,gate_weights,hidden_states"
    )
    assert main(["fit", "-c", str(CONFIGS / "data/traces.yaml"), *words, f"--data.traces={tmp_path / 'without'}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"moe-beyond: error: {name} reads hidden states, and the traces have none")


def test_a_teacher_may_read_states_that_its_pupil_does_not(tmp_path):
    tiny_traces(tmp_path / "traces", hidden_states=True)
    trainer = ["-c", str(CONFIGS / "trainer/default.yaml"), "--trainer.max_epochs=1"]
    (tmp_path / "teacher").mkdir()
    mlp = [*trainer, "-c", str(CONFIGS / "model/layer_mlp.yaml"), "--model.width=8"]
    teacher = fit(tmp_path / "teacher", tmp_path / "traces", *mlp)
    words = [*trainer, "-c", str(CONFIGS / "model/cross_layer.yaml"), *TINY_CROSS_LAYER]
    words += ["--model.lookaheads=1", "--model.next_token_head=false", f"--model.teachers=[{teacher / 'predictor'}]"]
    pupil = fit(tmp_path, tmp_path / "traces", *words) / "predictor"
    assert read_config(pupil)["hidden_states"] == []
    assert read_config(pupil)["training"]["recipe"]["teachers"] == 1
