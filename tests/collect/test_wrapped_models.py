"""Experts behind wrappers, in fused blocks, and spread over processes: what is recorded, or refused in one line."""

from typing import Any

import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.router_probe import find_routers
from moe_beyond.collect.steering import steered
from moe_beyond.errors import UserError
from moe_beyond.traces.steering import Steering

PROMPT = torch.tensor([[40, 3, 3, 17, 60, 8, 21, 4, 33]])
STEERING = Steering(((0, 1),), ((1, 0),))
FUSABLE = ("GptOssForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")


class Delta(nn.Module):
    """Adds to a parameter, as an adapter does while its module runs."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class Adapter(nn.Module):
    """A wrapper around a module that changes one of its parameters, of the shape of PEFT's `ParamWrapper`."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        target = self.target()
        shape = getattr(target, name).shape
        # A matrix with more rows than there are experts, as of an adapter of each: it is no router's.
        self.lora_a = nn.Linear(4, 2 * moes.EXPERTS)
        self.delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.2

    def target(self) -> nn.Module:
        module = self.base_layer
        while isinstance(module, Adapter | NamedAdapter):
            module = module.base_layer
        return module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        target = self.target()
        parametrize.register_parametrization(target, self.name, Delta(self.delta))
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            parametrize.remove_parametrizations(target, self.name, leave_parametrized=False)


class NamedAdapter(Adapter):
    """The same, with the very arguments of the experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        return super().forward(hidden_states, top_k_index, top_k_weights)


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def read(model: Any) -> tuple[np.ndarray, np.ndarray]:
    with recording(model) as recorder, torch.inference_mode():
        model(PROMPT)
        return recorder.pop_concatenated()


@pytest.mark.parametrize("kinds", [(Adapter,), (Adapter, Adapter), (NamedAdapter,), (NamedAdapter, Adapter)])
def test_adapters_on_experts_are_climbed_past(kinds: tuple[type[Adapter], ...]) -> None:
    model = moes.tiny_model("OlmoeForCausalLM")
    plain_routers, plain = find_routers(model), read(model)
    for block in blocks(model):
        for kind, name in zip(kinds, ("gate_up_proj", "down_proj"), strict=False):
            block.experts = kind(block.experts, name)
    experts, weights = read(model)
    assert np.array_equal(experts[:, 0], plain[0][:, 0])  # what is before the first adapter is the same
    assert not np.array_equal(weights[:, 1:], plain[1][:, 1:])
    routers = find_routers(model)
    assert {layer: router.name for layer, router in routers.items()} == {
        layer: router.name for layer, router in plain_routers.items()
    }
    assert all(router.agreement == 1 for router in routers.values())
    geometry = measured_geometry(model, "tiny", moes.TOP_K)
    assert geometry.params_per_expert == 3 * moes.HIDDEN * moes.WIDTH
    with steered(model, STEERING, geometry):
        forced, _ = read(model)
    assert (forced[:, 0] == 1).any(-1).all()
    assert not (forced[:, 1] == 0).any()


@pytest.mark.parametrize("persistent", [False, True])
def test_the_router_that_an_adapter_makes_is_found(persistent: bool) -> None:
    """Its weight is no parameter: it is the sum that was multiplied."""
    model = moes.tiny_model("OlmoeForCausalLM")
    sums = []
    for block in blocks(model):
        adapter = Adapter(block.gate, "weight")
        sums.append(block.gate.weight.detach() + adapter.delta)
        if persistent:
            parametrize.register_parametrization(block.gate, "weight", Delta(adapter.delta))
        else:
            block.gate = adapter
    experts, _ = read(model)
    routers = find_routers(model)
    assert sorted(routers) == [0, 1, 2, 3]
    for layer, router in routers.items():
        assert router.agreement == 1
        assert torch.equal(router.weight, sums[layer])
    with steered(model, STEERING, measured_geometry(model, "tiny", moes.TOP_K)):
        forced, _ = read(model)
    assert not np.array_equal(forced, experts)


def fused(block: Any) -> Any:
    """The forward of a block in one kernel, which neither calls the experts module nor the router."""
    router = block.router if hasattr(block, "router") else block.gate

    def forward(hidden_states: Tensor) -> Any:
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        logits = functional.linear(flat, router.weight, getattr(router, "bias", None))
        *_, scores, indices = type(router).forward(router, flat)
        if hasattr(router, "bias"):  # gpt-oss chooses by the logits, which steering has changed
            scores, indices = logits.topk(router.top_k)
            scores = scores.softmax(-1)
        output = type(block.experts).forward(block.experts, flat, indices, scores).reshape(shape)
        return (output, logits) if hasattr(block, "router") else output

    return forward


@pytest.mark.parametrize("calls_router", [False, True])
@pytest.mark.parametrize("name", FUSABLE)
def test_a_fused_block_is_recorded_by_its_router(name: str, calls_router: bool, monkeypatch) -> None:
    model = moes.tiny_model(name)
    plain = read(model)
    for block in blocks(model):
        forward = fused(block)
        if calls_router:
            router = block.router if hasattr(block, "router") else block.gate

            def forward(hidden_states: Tensor, *, router: Any = router, inner: Any = forward) -> Any:
                router(hidden_states.reshape(-1, hidden_states.shape[-1]))
                return inner(hidden_states)

        monkeypatch.setattr(block, "forward", forward)
    experts, weights = read(model)
    assert np.array_equal(experts, plain[0])
    np.testing.assert_array_equal(weights, plain[1])
    assert sorted(find_routers(model)) == [0, 1, 2, 3]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_fused_block_is_steered_as_recorded(monkeypatch) -> None:
    model = moes.tiny_model("GptOssForCausalLM")
    geometry = measured_geometry(model, "tiny", moes.TOP_K)
    with steered(model, STEERING, geometry):
        plain, _ = read(model)
    for block in blocks(model):
        monkeypatch.setattr(block, "forward", fused(block))
    with steered(model, STEERING, geometry):
        experts, _ = read(model)
    assert np.array_equal(experts, plain)


def test_one_fused_layer_among_others_is_recorded(monkeypatch) -> None:
    model = moes.tiny_model("GptOssForCausalLM")
    plain = read(model)
    monkeypatch.setattr(blocks(model)[2], "forward", fused(blocks(model)[2]))
    experts, weights = read(model)
    assert np.array_equal(experts, plain[0])
    assert np.array_equal(weights, plain[1])


def test_a_router_that_tells_no_choice_is_one_line(monkeypatch) -> None:
    """It returns logits; the block makes the choice, and a kernel replaces the block here."""
    model = moes.tiny_model("MixtralForCausalLM")
    block = blocks(model)[1]
    monkeypatch.setattr(block, "forward", lambda hidden_states: hidden_states)
    monkeypatch.setattr(
        block.gate, "forward", lambda hidden_states: functional.linear(hidden_states, block.gate.weight)
    )
    with pytest.raises(UserError) as error:
        read(model)
    assert str(error.value) == (
        "MixtralForCausalLM: layer 1 computes its experts without calling model.layers.1.mlp.experts, and its router "
        "does not show its choice; load it without fused kernels (use_kernels=False), or dequantized "
        "(Mxfp4Config(dequantize=True))"
    )


def test_a_layer_whose_block_never_runs_is_one_line(monkeypatch) -> None:
    model = moes.tiny_model("MixtralForCausalLM")
    monkeypatch.setattr(model.model.layers[2], "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(
        UserError, match=r"^layer 2 routed in 0 of 1 forwards of the model; its experts were not called"
    ):
        read(model)


def test_expert_parallelism_is_refused() -> None:
    """A rank holds a part of the experts, under ids of its own."""
    model = moes.tiny_model("Qwen3MoeForCausalLM")
    for block in blocks(model):
        block.experts.num_experts, block.experts._is_expert_parallel = moes.EXPERTS // 2, True
    with pytest.raises(UserError) as error:
        read(model)
    assert str(error.value) == (
        "Qwen3MoeForCausalLM: its experts are spread over several processes (expert parallelism), and "
        "model.layers.0.mlp.experts has 4 of them; load it with a device_map, or with tensor parallelism"
    )
