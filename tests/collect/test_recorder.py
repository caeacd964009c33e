"""State that the recorder leaves, and models that it refuses; `test_architectures.py` checks its records."""

import pytest
import torch
from _helpers.moe_architectures import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from moe_beyond.collect.recorder import recording
from moe_beyond.errors import UserError


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model("MixtralForCausalLM")
    with recording(model):
        assert any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_towers_of_experts_are_refused() -> None:
    """Two towers, as in a multimodal model: the number of a layer is ambiguous."""
    both = torch.nn.ModuleDict({name: tiny_model("MixtralForCausalLM") for name in ("language", "vision")})
    with (
        pytest.raises(UserError, match=r"layer 0 has experts at vision\.model.* and at language\.model"),
        recording(both),
    ):
        pass


def test_a_dense_model_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(UserError, match="has no experts module; give a mixture-of-experts model"), recording(model):
        pass
