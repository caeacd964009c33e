"""The recorder sees what the experts receive, whatever the architecture."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from moe_beyond.collect.recorder import recording
from moe_beyond.errors import UserError

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS = {
    "deepseek_v2": (DeepseekV2Config(**SIZES, **DEEPSEEK, topk_method="greedy"), (1, 2)),
    "deepseek_v3": (DeepseekV3Config(**SIZES, **DEEPSEEK), (1, 2)),
    "gpt_oss": (GptOssConfig(**SIZES, num_local_experts=8, head_dim=8), (0, 1, 2)),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=8), (0, 1, 2)),
    "qwen3_moe": (Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16, head_dim=8), (0, 1, 2)),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name][0]).eval()
    for key, tensor in model.state_dict().items():
        # A fresh model's routers may tie and have no selection bias; a trained one's differ.
        if "gate" in key or "router" in key:
            torch.nn.init.normal_(tensor, std=0.5)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_it_records_what_the_experts_receive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, token_ids = build(name), torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(1))
    received: list[tuple[np.ndarray, np.ndarray]] = []
    experts_modules = [m for n, m in model.named_modules() if n.endswith(".experts")]
    for module in experts_modules:
        forward = module.forward

        def spy(hidden, index, weights, forward=forward, **more):
            received.append((index.numpy().copy(), weights.float().numpy().copy()))
            return forward(hidden, index, weights, **more)

        monkeypatch.setattr(module, "forward", spy)
    with recording(model) as recorder, torch.inference_mode():
        model(token_ids)
        experts, weights = recorder.take()
    assert recorder.moe_layers == CONFIGS[name][1]
    assert experts.shape == weights.shape == (11, len(recorder.moe_layers), 2)
    assert np.array_equal(experts, np.stack([index for index, _ in received], 1))
    assert np.array_equal(weights, np.stack([weight for _, weight in received], 1))
    assert len(np.unique(experts)) > 2


@pytest.mark.parametrize("name", CONFIGS)
def test_generating_routes_like_reading_what_was_generated(name: str) -> None:
    model, prompt = build(name), torch.tensor([[1, 2, 3, 4]])
    with recording(model) as recorder, torch.inference_mode():
        written = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        generated, _ = recorder.take()
        model(written[:, :-1])  # the last token is never read
        read, _ = recorder.take()
    assert len(generated) == 4 + 5 - 1
    assert np.array_equal(np.sort(generated), np.sort(read))


def test_hooks_are_gone_afterwards() -> None:
    model = build("mixtral")
    with recording(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_towers_of_experts_are_refused() -> None:
    """As of a model that also looks: which of them a layer's number means, nobody says."""
    both = torch.nn.ModuleDict({"language": build("mixtral"), "vision": build("qwen3_moe")})
    with pytest.raises(UserError, match=r"layer 0 has experts at vision\.model.* elsewhere"), recording(both):
        pass


def test_a_dense_model_is_refused() -> None:
    dense = {key: value for key, value in SIZES.items() if key != "num_experts_per_tok"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**dense))
    with pytest.raises(UserError, match="no experts module found; is it a mixture of experts"), recording(model):
        pass
