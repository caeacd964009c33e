"""Every mixture of experts of the installed transformers: its experts are found, or refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from torch import nn
from torch.nn.utils import parametrize

from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.errors import UserError
from moe_beyond.runtime.experts import experts_per_token, find_offloadable, runtime_geometry
from moe_beyond.runtime.storage.store import BytesBySource, HostStore

UNDECORATED = ("dbrx", "jetmoe", "llama4", "longcat_flash")


@pytest.mark.parametrize("name", [name for name in moes.architectures() if name not in moes.REFUSED])
def test_every_architecture_is_found_or_refused(name: str) -> None:
    model = moes.tiny_model(name)
    if moes.architectures()[name] in UNDECORATED:
        with pytest.raises(UserError, match=r"experts are computed outside transformers' experts registry"):
            find_offloadable(model)
        return
    layers = find_offloadable(model)
    assert list(layers) == list(range(len(layers)))
    top_k = experts_per_token(model, layers)
    assert runtime_geometry(model, layers, "m", top_k) == measured_geometry(model, "m", top_k)
    store = HostStore.of_model(layers)
    for position, layer in layers.items():
        parameters = dict(layer.module.named_parameters(recurse=False))
        slab = np.zeros(layer.layout.stride, np.uint8)
        for expert in range(layer.num_experts):
            slab[:] = 255
            read = store.read(position * layer.num_experts + expert, slab)
            assert read == BytesBySource(host=layer.layout.nbytes)
            views = layer.layout.views(torch.from_numpy(slab)[None])
            assert views.keys() == parameters.keys()
            for field, view in views.items():
                assert torch.equal(view[0], parameters[field][expert])
    memory = sum(parameter.nbytes for layer in layers.values() for parameter in layer.module.parameters(recurse=False))
    assert store.nbytes == memory


def mixtral(**more: Any) -> Any:
    return moes.tiny_model("MixtralForCausalLM", **more)


def refusal(model: nn.Module) -> str:
    with pytest.raises(UserError) as error:
        find_offloadable(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_parameters_of_the_model_are_used_without_a_copy() -> None:
    layers = find_offloadable(mixtral())
    store = HostStore.of_model(layers)
    for layer in layers.values():
        layer.module.down_proj.data[3] = 7.0
    for position, layer in layers.items():
        slab = np.zeros(layer.layout.stride, np.uint8)
        store.read(position * moes.EXPERTS + 3, slab)
        assert (layer.layout.views(torch.from_numpy(slab)[None])["down_proj"] == 7).all()


def test_a_filled_store_is_one_allocation_of_exact_size() -> None:
    layers = find_offloadable(mixtral())
    source = HostStore.of_model(layers)
    store = HostStore.filled(source, moes.EXPERTS)
    stride = layers[0].layout.stride
    assert store.nbytes == stride * moes.EXPERTS * len(layers)
    one, other = np.zeros(stride, np.uint8), np.zeros(stride, np.uint8)
    for expert in range(moes.EXPERTS * len(layers)):
        source.read(expert, one)
        store.read(expert, other)
        assert np.array_equal(one, other)
    assert store.describe(moes.EXPERTS + 2) == "expert 2 of MoE layer 1 in host memory"
    store.close()
    assert store.nbytes == 0


def test_a_dense_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    assert refusal(LlamaForCausalLM(config)).startswith("LlamaForCausalLM: has no experts module")


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "fp8", "gguf", "compressed-tensors"])
def test_a_quantized_model_is_refused_with_its_remedy(method: str) -> None:
    model = mixtral()
    model.config.quantization_config = {"quant_method": method}
    message = refusal(model)
    assert f"while it is quantized (got {method}); " in message
    assert {"bitsandbytes": "16 bits", "mxfp4": "Mxfp4Config(dequantize=True)"}.get(method, "") in message


def test_experts_of_another_registry_are_refused() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    model = mixtral()
    model.config.hidden_activation = "silu"
    with torch.device("meta"):
        model.model.layers[0].mlp.experts = FP8Experts(model.config)
    assert "experts registry (FP8Experts)" in refusal(model)


def test_an_adapter_is_refused() -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args: Any) -> Any:
            return self.base_layer(*args)

    model = mixtral()
    model.model.layers[1].mlp.experts = Adapter(model.model.layers[1].mlp.experts)
    assert "an adapter wraps model.layers.1.mlp.experts.base_layer" in refusal(model)
    model = mixtral()
    parametrize.register_parametrization(model.model.layers[1].mlp.experts, "down_proj", nn.Identity())
    assert "an adapter wraps model.layers.1.mlp.experts" in refusal(model)


def test_weights_elsewhere_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    with torch.device("meta"):
        model = moes.model_class("MixtralForCausalLM")(moes.tiny_config("MixtralForCausalLM"))
    assert "has no weights (meta device); load the model whole, or use load_offloaded" in refusal(model)
    model = mixtral()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert "accelerate moves its weights (device_map)" in refusal(model)
    model = mixtral()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    assert "expert parallelism" in refusal(model)


def test_other_implementations_and_sizes_are_refused() -> None:
    model = mixtral()
    model.config._experts_implementation = "sonicmoe"
    assert "(got sonicmoe); call set_experts_implementation with one of: eager, grouped_mm, batched_mm" in refusal(
        model
    )
    model = mixtral()
    experts = model.model.layers[2].mlp.experts
    experts.num_experts = 4
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(parameter[:4]))
    assert "model.layers.3.mlp.experts has 8 experts and model.layers.2.mlp.experts has 4" in refusal(model)


def test_parts_of_parameters_are_refused() -> None:
    class Sharded(torch.Tensor):
        pass

    model = mixtral()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Sharded), requires_grad=False)
    assert "model.layers.1.mlp.experts.down_proj is quantized or spread over processes (got Sharded)" in refusal(model)
