"""Routers found in every mixture of experts of the installed transformers: their scores explain the recorded choice."""

from typing import Any

import pytest
import torch
from _helpers import moe_architectures as moes
from _helpers.moe_architectures import EXPERTS, HIDDEN, IDENTITIES
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.router_probe import Router, find_routers
from moe_beyond.collect.steering import steered
from moe_beyond.traces.steering import Steering

WITHOUT = {"deepseek_v4": ((0, 1, 2), "its first layers look the experts up in a table of tokens")}
"""Layers whose router is not found, and why."""


def read_and_chosen(model: Any, routers: dict[int, Router]) -> dict[int, tuple[Tensor, Tensor]]:
    """Run a model over other tokens than the probe's; return each router's input, and the recorded choice."""
    read: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            read[layer] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    handles = [router.module.register_forward_pre_hook(keep(layer)) for layer, router in routers.items()]
    with recording(model) as recorder, torch.inference_mode():
        model(moes.PROMPT)
        experts, _ = recorder.pop_concatenated()
    for handle in handles:
        handle.remove()
    return {layer: (read[layer], torch.from_numpy(experts[:, recorder.moe_layers.index(layer)])) for layer in routers}


@pytest.mark.parametrize("name", [name for name in moes.architectures() if name not in moes.REFUSED])
def test_scores_of_what_is_found_choose_what_was_recorded(name: str) -> None:
    model = moes.tiny_model(name)
    routers = find_routers(model)
    with recording(model) as recorder:
        without, _ = WITHOUT.get(moes.architectures()[name], ((), ""))
        assert set(routers) == set(recorder.moe_layers) - set(without)
    for layer, (read, experts) in read_and_chosen(model, routers).items():
        router = routers[layer]
        assert torch.equal(model.get_parameter(router.name)[: len(router.weight)], router.weight)
        top = router.scores(read).topk(experts.shape[1]).indices.sort().values
        top = top.where(top < EXPERTS, -1).sort().values
        shared = (top[:, :, None] == experts[:, None]).any(-1).float().mean()
        if moes.groups(model):  # which limit the choice to half of them
            assert router.agreement > 0.6
            assert shared > 0.5
        else:
            assert router.agreement == 1
            assert torch.equal(top, experts.sort().values)


@pytest.mark.parametrize(
    ("name", "scoring", "shape", "bias", "selection_bias"),
    [
        ("MixtralForCausalLM", "softmax", (EXPERTS, HIDDEN), None, None),
        ("GptOssForCausalLM", "logits", (EXPERTS, HIDDEN), "router.bias", None),
        ("FlintForCausalLM", "sigmoid", (EXPERTS, HIDDEN), None, None),
        ("DeepseekV3ForCausalLM", "sigmoid", (EXPERTS, HIDDEN), None, "e_score_correction_bias"),
        ("DeepseekV4ForCausalLM", "sqrtsoftplus", (EXPERTS, HIDDEN), None, "e_score_correction_bias"),
        ("Kolibri1ForCausalLM", "logits", (EXPERTS, HIDDEN), None, "e_score_correction_bias"),
        ("Ernie4_5_MoeForCausalLM", "softmax", (EXPERTS, HIDDEN), None, "moe_statics.e_score_correction_bias"),
        # A row of its weight is of the shared expert; identity experts are choices; three maps read 16 numbers last.
        ("InklingForCausalLM", "sigmoid", (EXPERTS, HIDDEN), None, "e_score_correction_bias"),
        ("LongcatFlashForCausalLM", "softmax", (EXPERTS + IDENTITIES, HIDDEN), None, "e_score_correction_bias"),
        ("ZayaForCausalLM", "softmax", (EXPERTS + 1, 16), None, "balancing_biases"),
    ],
)
def test_what_is_done_to_the_scores_is_told(name, scoring, shape, bias, selection_bias) -> None:
    model = moes.tiny_model(name)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for key, tensor in tensors.items():
        if "moe_statics" in key:
            nn.init.normal_(tensor.data, std=0.1)
    layer, router = list(find_routers(model).items())[-1]
    assert (router.scoring, router.weight.shape, router.num_experts) == (scoring, shape, EXPERTS)
    for found, key in ((router.bias, bias), (router.selection_bias, selection_bias)):
        assert (found is None) == (key is None)
        if key is not None:
            (of_layer,) = (t for k, t in tensors.items() if f"layers.{layer}." in k and k.endswith(key))
            assert torch.equal(found, of_layer.flatten())


def test_weights_that_are_cast_before_the_product_are_found() -> None:
    """As in bfloat16, where routers compute in float32; groups of one expert limit nothing."""
    model = moes.tiny_model("DeepseekV3ForCausalLM", n_group=1, topk_group=1).to(torch.bfloat16)
    routers = find_routers(model)
    assert len(routers) == 3
    for router in routers.values():
        assert router.weight.dtype == torch.bfloat16
        assert (router.scoring, router.agreement) == ("sigmoid", 1)


@pytest.mark.parametrize(
    "product",
    [
        lambda read, weight: torch.mm(read, weight.t()),
        lambda read, weight: torch.matmul(read, weight.t()),
        lambda read, weight: read @ weight.t(),
        lambda read, weight: read.matmul(weight.T),
        lambda read, weight: functional.linear(input=read, weight=weight),
    ],
    ids=["mm", "matmul", "operator", "method", "keywords"],
)
def test_a_product_is_found_however_it_is_written(product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kolibri multiplies by `torch.mm` only on a GPU."""
    model = moes.tiny_model("MixtralForCausalLM", num_hidden_layers=1)
    gate = model.model.layers[0].mlp.gate
    top_k = gate.top_k

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = product(hidden_states.reshape(-1, HIDDEN), gate.weight)
        return logits, *logits.softmax(-1).topk(k=top_k)

    monkeypatch.setattr(gate, "forward", forward)
    (router,) = find_routers(model).values()
    assert (router.module, router.scoring, router.agreement) == (gate, "softmax", 1)
    steering = Steering(((0, 3),), ((0, 1),))
    with steered(model, steering, measured_geometry(model, "tiny", top_k)):  # which tries it
        pass


def test_a_model_is_left_as_it_was() -> None:
    model = moes.tiny_model("MixtralForCausalLM").train()
    before = torch.overrides._get_current_function_mode()
    find_routers(model)
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode() is before
