"""Experts forced on and off: in every mixture of experts of the installed transformers, and through a collection."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from _helpers.common import failure
from _helpers.moe_architectures import EXPERTS
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_beyond.cli.main import main
from moe_beyond.collect import collection as collecting
from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.prompts import Prompt
from moe_beyond.collect.recorder import LAYER, recording
from moe_beyond.collect.router_probe import find_routers
from moe_beyond.collect.steering import MARGIN, steered
from moe_beyond.errors import UserError
from moe_beyond.hub.traces import traces_card
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.steering import Steering

SMALL = shipped_folder("small-moe")
PROMPT = torch.tensor([[40, 3, 3, 17, 60, 8, 21, 4, 33]])
OF_EXPERTS = re.compile(r"(?<!attention)\.experts\.|\bmlp\.(input|output)_linear\.weight")
"""What computes experts, by name; jetmoe has no module for them."""
TEXTS = ("def main():", "The list of arguments", "import numpy as np")


def perturb(model: Any, layer: int, expert: int) -> None:
    """Change what an expert computes."""
    for key, tensor in model.named_parameters():
        found = LAYER.search(key)
        if OF_EXPERTS.search(key) and found and int(found[1]) == layer:
            nn.init.normal_(tensor.data.view(EXPERTS, -1)[expert])


def shape_of(model: Any, top_k: int = moes.TOP_K) -> Any:
    return measured_geometry(model, "tiny", getattr(model.config, "num_experts_per_tok", None) or top_k)


def routed_under(model: Any, steering: Steering) -> tuple[np.ndarray, np.ndarray]:
    with steered(model, steering, shape_of(model)), recording(model) as recorder, torch.inference_mode():
        model(PROMPT)
        return recorder.pop_concatenated()


@pytest.mark.parametrize("name", [name for name in moes.architectures() if name not in moes.REFUSED])
def test_no_token_uses_what_is_off_and_all_use_what_is_on(name: str) -> None:
    """Independent of a recording: the weights of an expert have an effect, or none."""
    model = moes.tiny_model(name)
    with recording(model) as recorder, torch.inference_mode():
        model(PROMPT)
        experts, _ = recorder.pop_concatenated()
    layer = recorder.moe_layers[-1]
    used = np.bincount(experts[:, -1][experts[:, -1] >= 0], minlength=EXPERTS).argsort()
    on, off = int(used[0]), (int(used[-1]), int(used[-2]))  # the opposite of its own choice
    steering = Steering(((layer, on),), tuple(sorted((layer, expert) for expert in off)))
    with steered(model, steering, shape_of(model, experts.shape[-1])), torch.inference_mode():
        before = model(PROMPT).logits
        for expert in off:
            perturb(model, layer, expert)
        assert torch.equal(model(PROMPT).logits, before)
        perturb(model, layer, on)
        assert not torch.isclose(model(PROMPT).logits, before).all(-1).any()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_weights_follow_from_the_changed_scores(name: str) -> None:
    """One token and one expert after the other; a selection bias of DeepSeek decides, but not here."""
    model = moes.tiny_model(name)
    layer, router = next(iter(find_routers(model).items()))
    read = []
    handle = router.module.register_forward_pre_hook(lambda module, args: read.append(args[0].view(-1, moes.HIDDEN)))
    experts, weights = routed_under(model, Steering(((layer, 3),), ((layer, 0), (layer, 6))))
    handle.remove()
    for token, states in enumerate(read[-1]):
        logits = [float(states @ row) for row in router.weight]
        highest, lowest = max(logits), min(logits)
        logits[3], logits[0], logits[6] = highest + MARGIN, lowest - MARGIN, lowest - MARGIN
        chosen = [int(expert) for expert in experts[token, 0]]
        if name.startswith("Mixtral"):
            assert chosen == sorted(range(EXPERTS), key=lambda expert: -logits[expert])[:2]
            scores = np.exp(np.array(logits) - max(logits))
        else:
            assert chosen[0] == 3
            scores = model.config.routed_scaling_factor / (1 + np.exp(-np.array(logits)))
        shares = scores[chosen] / scores[chosen].sum()
        expected = shares * (1 if name.startswith("Mixtral") else model.config.routed_scaling_factor)
        np.testing.assert_allclose(weights[token, 0], expected, rtol=1e-4)


def test_scores_that_round_to_one_another_do_not_matter() -> None:
    """Phi takes maxima, of logits that are hundreds apart here, where bfloat16 has but every other whole number."""
    model = moes.tiny_model("PhimoeForCausalLM")
    for layer in model.model.layers:
        layer.mlp.router.weight.data *= 100
    steering = Steering(((1, 6), (1, 7)))
    experts, _ = routed_under(model.to(torch.bfloat16), steering)
    steering.check_obeyed(experts, shape_of(model))


def test_groups_that_are_not_kept_do_not_keep_an_expert_off() -> None:
    """One of four groups is kept; gate weights are scores, so that experts of two groups can be on."""
    model = moes.tiny_model("DeepseekV3ForCausalLM", n_group=4, topk_group=1)
    experts, weights = routed_under(model, Steering(((1, 0), (1, 7))))
    assert np.array_equal(np.sort(experts[:, 0]), np.broadcast_to([0, 7], experts[:, 0].shape))
    assert (weights[:, 0] > 0).all()
    # The remaining experts are of four groups, one each: a second group follows the kept group.
    experts, _ = routed_under(model, Steering(off=((1, 0), (1, 2), (1, 4), (1, 6))))
    assert set(experts[:, 0].ravel().tolist()) <= {1, 3, 5, 7}


def test_what_groups_do_keep_off_is_refused() -> None:
    """Where weights are of the scores that groups have masked, they are 0."""
    model = moes.tiny_model("DeepseekV2ForCausalLM", topk_method="group_limited_greedy", n_group=4, topk_group=1)
    routed_under(model, Steering(((1, 0), (1, 1))))
    with pytest.raises(UserError, match=r"expert 0 of layer 1 was forced on, but 128 of 128 tokens do not use it"):
        routed_under(model, Steering(((1, 0), (1, 2))))


def test_a_table_of_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"--steer: layer 1 of tiny cannot be steered: no scores explain its choice"):
        routed_under(moes.tiny_model("DeepseekV4ForCausalLM"), Steering(off=((1, 0), (3, 0))))


def test_an_error_of_the_model_leaves_nothing_behind() -> None:
    model = moes.tiny_model("MixtralForCausalLM")
    with (
        pytest.raises(IndexError),
        steered(model, Steering(off=((1, 0),)), shape_of(model)),
        model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda module, args: [][0]),
    ):
        model(PROMPT)
    assert torch.overrides._get_current_function_mode() is None


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32), AutoTokenizer.from_pretrained(SMALL)


def collected(small: tuple[Any, Any], out: Path, steering: Steering | None) -> TraceSet:
    prompts = [Prompt(text, f"p{n}") for n, text in enumerate(TEXTS)]
    traces = collect(*small, prompts, out, CollectConfig(16, steering=steering), rank=ProcessRank(0, 1))
    assert traces is not None
    return traces


def test_a_collection_is_steered_and_says_so(small: tuple[Any, Any], tmp_path: Path, capsys) -> None:
    let_be = collected(small, tmp_path / "let_be", None)
    steering = Steering(((2, 5), (4, 0)), tuple((2, expert) for expert in (1, 2, 3)))
    traces = collected(small, tmp_path / "steered", steering)
    for trace, before in zip(traces.traces(), let_be.traces(), strict=True):
        steering.check_obeyed(trace.experts, traces.geometry)
        assert not np.array_equal(trace.experts, before.experts)
    written = [[trace.token_ids.tolist() for trace in one.traces()] for one in (traces, let_be)]
    assert written[0] != written[1]
    assert traces.manifest.steering == steering
    assert let_be.manifest.steering is None
    for folder, is_steered in (("steered", True), ("let_be", False)):
        assert main(["inspect", str(tmp_path / folder)]) == 0
        assert ("2 experts on, 3 off" in capsys.readouterr().out) == is_steered
    card = traces_card(traces.manifest)
    assert "- Steering: 2 experts on, 3 off, for every token" in card
    assert "teered" not in traces_card(let_be.manifest)


def test_a_model_that_does_not_obey_makes_no_trace_set(small: tuple[Any, Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(collecting, "steered", lambda *_: nullcontext())
    with pytest.raises(UserError, match=r"expert 5 of layer 2 was forced on, but [\d]+ of [\d]+ tokens do not use it"):
        collected(small, tmp_path / "traces", Steering(((2, 5),)))
    assert not list(tmp_path.rglob("*.parquet"))


def test_another_steering_does_not_go_on_with_what_was_begun(small: tuple[Any, Any], tmp_path: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    def begin(expert: int) -> None:
        asked = CollectConfig(batch_size=1, steering=Steering(off=((2, expert),)))
        prompts = [Prompt(text, f"p{n}") for n, text in enumerate(TEXTS)]
        collect(*small, prompts, tmp_path / "traces", asked, rank=ProcessRank(0, 1), progress=interrupt)

    with pytest.raises(KeyboardInterrupt):
        begin(1)
    with pytest.raises(UserError, match="contains an unfinished collection with different steering"):
        begin(2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "steer.json: is not JSON"),
        ("on: 3", "steer.json: is not JSON"),
        ("[" * 100000, "steer.json: is not JSON"),
        ("[[1, 2]]", 'steer.json: must be an object {"on": [[layer, expert], ...], "off": [[layer, expert], ...]}'),
        ("{}", "steer.json: has no expert"),
        ('{"onn": [[1, 2]]}', "steer.json: unknown key 'onn'; did you mean 'on'?"),
        ('{"on": {"1": 2}}', "steer.json: 'on' must be a list (got {\"1\": 2}); an expert is a pair of whole numbers"),
        ('{"off": [[1, 2], [1]]}', "steer.json: 'off' holds [1]; an expert is a pair of whole numbers"),
        ('{"off": [[1, true]]}', "'off' holds [1, true]"),
        ('{"off": [[1, 2.0]]}', "'off' holds [1, 2.0]"),
        ('{"off": [[1, -2]]}', "'off' holds [1, -2]"),
        ('{"on": [[1, 2]], "off": [[1, 2]]}', "steer.json: expert 2 of layer 1 is both on and off; choose one"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys, text: str, says: str) -> None:
    (tmp_path / "steer.json").write_text(text)
    words = ["collect", "--model", SMALL, "--prompts", "p.txt", "--steer", tmp_path / "steer.json"]
    assert says in failure(capsys, tmp_path, [*words, "--out", tmp_path / "traces"])


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        (Steering(off=((9, 2),)), "layer 9 of small-moe has no experts; choose from 1, 2, 3, 4, 5, 6, 7, 8"),
        (Steering(((2, 24),)), "layer 2 of small-moe has no expert 24; choose from 0..23"),
        (Steering(tuple((2, e) for e in range(4))), "4 experts of layer 2 are on, but a token is routed to 3"),
        (Steering(off=tuple((2, e) for e in range(24))), "0 of the 24 experts of layer 2 remain"),
        (Steering(off=tuple((2, e) for e in range(22))), "2 of the 24 experts of layer 2 remain"),
    ],
)
def test_what_a_model_cannot_do_is_named(small: tuple[Any, Any], steering: Steering, says: str) -> None:
    with pytest.raises(UserError, match=f"^--steer: {says}"):
        steering.check_fits(measured_geometry(small[0], "small-moe", 3))


def test_the_command_line_steers_or_leaves_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "steer.json").write_text(json.dumps({"off": [[9, 2]]}))
    (tmp_path / "prompts.txt").write_text("def main():\n")
    words = ["collect", "--model", SMALL, "--prompts", tmp_path / "prompts.txt", "--steer", tmp_path / "steer.json"]
    words += ["--out", tmp_path / "traces"]
    assert "layer 9 of small-moe has no experts" in failure(capsys, tmp_path, words)
    (tmp_path / "steer.json").write_text(json.dumps({"off": [[8, 2]]}))
    assert main([*map(str, words), "--generate", "2"]) == 0
    assert f"{tmp_path / 'traces'}: steered: 1 expert off" in capsys.readouterr().out
    assert TraceSet(str(tmp_path / "traces")).manifest.steering == Steering(off=((8, 2),))
