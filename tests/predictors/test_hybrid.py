"""The reader of hidden states by hand, and `hybrid` where states are missing, projected or taught."""

import json
import math

import numpy as np
import pytest
import torch
from _helpers.common import FULL, TINY, VOCAB, error_line, projected_traces, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, fit
from _helpers.predictor_variants import HIDDEN, Variant, fitted, probabilities, random_trace

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.hybrid import Hybrid
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.predictors.modules.state_reader import StateReader
from moe_beyond.predictors.stepping.state_reader import StateReaderSteps
from moe_beyond.testing import check_predictor

LAYERS, EXPERTS, TOP_K = TINY.shape()
TINY_HYBRID = (*TINY_CROSS_LAYER, "--model.state_width=8")
SMALL = {
    "width": 8,
    "depth": 1,
    "heads": 2,
    "layer_width": 8,
    "state_width": 8,
    "window": 5,
    "memory_tokens": 0,
    "memory_prefixes": 0,
}


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@torch.no_grad()
def test_a_reader_by_hand():
    reader = StateReader(layers=2, hidden_size=2, layer_width=1, width=2)
    reader.into.copy_(torch.tensor([[[1.0, 0], [0, 1]], [[0, 2.0], [1, 0]]]))
    reader.gain.copy_(torch.tensor([[1.0, 1], [1, 3]]))
    reader.absent.copy_(torch.tensor([[0.5, 0], [0, 0.25]]))
    reader.from_layer.copy_(torch.tensor([[[1.0, 0]], [[0, 1]]]))
    reader.from_before.copy_(torch.tensor([[[9.0, 9], [9, 9]], [[1, 0], [0, 0]]]))
    states, of_layers = torch.tensor([[[3.0, 4], [1, 7]]]), torch.tensor([[[0.2]], [[0.3]]])
    # Layer 0: (3, 4) has a mean square of 12.5. Layer 1: (1, 7) becomes (7, 2), of 26.5.
    first = silu(3 / math.sqrt(12.5) + 0.2), silu(4 / math.sqrt(12.5))
    second = silu(7 / math.sqrt(26.5) + first[0]), silu(3 * 2 / math.sqrt(26.5) + 0.3)
    features = (3 / math.sqrt(12.5), 4 / math.sqrt(12.5)), (7 / math.sqrt(26.5), 6 / math.sqrt(26.5))
    vectors, read = reader(reader.features(states, torch.tensor([True])), of_layers)
    np.testing.assert_allclose(vectors[:, 0], [first, second], rtol=1e-5)
    np.testing.assert_allclose(read[:, 0], np.hstack([[first, second], features]), rtol=1e-5)
    of_other = reader.after(reader.features(states, torch.tensor([True])), of_layers, vectors.roll(1, 0))
    np.testing.assert_allclose(of_other[1, 0], read[1, 0], rtol=1e-5)
    _, missing = reader(reader.features(states, torch.tensor([False])), of_layers)
    first = silu(0.7), 0.0
    expected = (*first, 0.5, 0), (silu(first[0]), silu(0.55), 0, 0.25)
    np.testing.assert_allclose(missing[:, 0], expected, rtol=1e-5, atol=1e-7)
    steps = StateReaderSteps(reader, None)
    for available, expected in ((True, read), (False, missing)):
        before = steps.nothing
        for layer in range(2):
            state = states[0, layer].numpy() if available else None
            outputs = steps.step(layer, state, of_layers[layer, 0].numpy(), before)
            np.testing.assert_allclose(outputs, expected[layer, 0], rtol=1e-5, atol=1e-7)
            before = outputs[:2]


def test_a_step_without_a_state_falls_back_to_the_learned_vector():
    predictor, trace = fitted(Variant("hybrid", "small", {"hidden_size": HIDDEN, **SMALL})), random_trace("a", 3, 0)
    ids_only = [stepped(predictor, trace, lambda token, layer: None) for _ in range(2)]
    np.testing.assert_array_equal(*ids_only)
    with torch.inference_mode():
        predictor.train()
        predictor.state_dropout = 1.0  # no token has states
        for drop in (module for module in predictor.modules() if isinstance(module, torch.nn.Dropout)):
            drop.p = 0.0
        predictor.token_dropout = 0.0
        expected = predictor.probabilities(predictor(collate([trace])))[0].numpy()
    for token in range(len(trace)):
        for layer in range(LAYERS):  # once the layer before is routed, by lookahead 1
            slice_of = 1 if layer else 0
            np.testing.assert_allclose(ids_only[0][token, layer], expected[token, slice_of, layer], atol=2e-5)


def stepped(predictor, trace, state_of) -> np.ndarray:
    """Score each layer of a trace just before it is routed, ``(T, L, E)``."""
    stepper, found = predictor.stepper(), []
    for token_id, experts in zip(trace.token_ids, trace.experts, strict=True):
        stepper.observe_token(int(token_id))
        for layer in range(LAYERS):
            found.append(stepper.scores()[layer])
            stepper.observe_layer(layer, experts[layer], state_of(len(found) // LAYERS, layer))
    return np.stack(found).reshape(-1, LAYERS, EXPERTS)


def test_states_of_earlier_tokens_change_no_score():
    predictor = fitted(Variant("hybrid", "small", {"hidden_size": HIDDEN, **SMALL}))
    trace, other = random_trace("a", 6, 0), random_trace("a", 6, 1)
    states = trace.hidden_states.arrays()
    for name, array in states.items():
        array[:5] = other.hidden_states.arrays()[name][:5]
    scores, changed = (probabilities(predictor, collate([each]))[0] for each in (random_trace("a", 6, 0), trace))
    np.testing.assert_array_equal(changed[5], scores[5])
    assert not np.allclose(changed[4], scores[4])


def test_projected_states_keep_the_contract():
    check_predictor(Hybrid, projected_from=9, **SMALL)


def test_widths_are_checked():
    with pytest.raises(UserError, match="hybrid reads hidden states, and the traces have none; collect them with"):
        Hybrid(TINY, VOCAB, None)
    with pytest.raises(UserError, match=r"hybrid: projected_from must exceed hidden_size 8 \(got 8\)"):
        Hybrid(TINY, VOCAB, 8, projected_from=8)
    with pytest.raises(UserError, match="hybrid: state_width must be a whole number"):
        Hybrid(TINY, VOCAB, 8, state_width=0)


def test_it_is_fitted_evaluated_and_teaches(tmp_path, capsys):
    """A layer's input determines its experts here: a score once the layer before is computed is nearly perfect."""
    traces = tiny_traces(tmp_path / "traces", sequences=40, hidden_states=True)
    trainer = ["-c", str(CONFIGS / "trainer/default.yaml"), "--trainer.max_epochs=30"]
    (tmp_path / "teacher").mkdir()
    model = ["-c", str(CONFIGS / "model/hybrid.yaml"), *TINY_HYBRID, "--model.optimizer.lr=0.02", "--model.dropout=0"]
    teacher = fit(tmp_path / "teacher", tmp_path / "traces", *trainer, *model) / "predictor"
    capsys.readouterr()
    asked = ["evaluate", str(teacher), "--traces", traces.folder, "--split", "validation", "--budget", "50%"]
    assert main([*asked, "--json", "-"]) == 0
    found = {row["lookahead"]: row for row in json.loads(capsys.readouterr().out)["metrics"]}
    assert list(found) == ["computed", 1, 2, 3, "next"]
    by_layer = {lookahead: [layer["recall_at_k"] for layer in row["by_layer"]] for lookahead, row in found.items()}
    assert min(by_layer["computed"][1:]) > 0.85 > max(by_layer[1][1:])
    pupil = ["-c", str(CONFIGS / "model/cross_layer.yaml"), *TINY_CROSS_LAYER, f"--model.teachers=[{teacher}]"]
    taught = fit(tmp_path, tmp_path / "traces", *trainer[:2], "--trainer.max_epochs=1", *pupil) / "predictor"
    config = read_config(taught)
    assert config["training"]["recipe"]["teachers"] == 1
    assert config["hidden_states"] == []
    assert (
        "Inputs: ids, hidden states of the current token (router inputs and layer inputs;"
        in (teacher / "README.md").read_text()
    )
    tiny_traces(tmp_path / "without")
    capsys.readouterr()
    assert error_line(capsys, ["evaluate", teacher, "--traces", tmp_path / "without"]) == (
        f"{tmp_path / 'without'}: has no hidden states, which hybrid requires; collect with --record "
        "experts,gate_weights,hidden_states"
    )
    narrow, _ = projected_traces(tmp_path / "narrow")
    assert error_line(capsys, ["evaluate", teacher, "--traces", narrow.folder]).startswith(
        f"{narrow.folder}: its hidden states are projected from {FULL} to {EXPERTS} values, and this hybrid reads"
    )
    some, _ = projected_traces(tmp_path / "some", layers=(1, 3))
    assert "has hidden states of 2 of 4 MoE layers, and hybrid reads those of all" in error_line(
        capsys, ["evaluate", teacher, "--traces", some.folder]
    )
