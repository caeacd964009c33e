"""Predictors that read hidden states, checked by hand and through the command line."""

import json
import math

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB, error_line, plain_routers, plain_states, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, fit
from _helpers.predictor_variants import random_trace, training_stats

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.next_gate import NextGate
from moe_beyond.predictors.architectures.pre_attention import PreAttention
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import check_fits, read_config
from moe_beyond.predictors.training_stats import TrainingStats
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
    return TrainingStats(counted.token_counts, counted.token_strings, counted.expert_counts, routers)


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
    assert read_config(pupil)["hidden_states"] is None
    assert read_config(pupil)["training"]["recipe"]["teachers"] == 1
