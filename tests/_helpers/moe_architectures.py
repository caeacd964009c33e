"""Every mixture of experts that transformers has a causal language model of, small enough to build in a test.

They are found in the text of its modeling files, so that a new release brings its new ones, and none is imported
before it is tried.
"""

import dataclasses
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

HIDDEN, WIDTH, LAYERS, EXPERTS, TOP_K, VOCAB = 64, 32, 4, 8, 2, 64
GROUPS, GROUPS_CHOSEN = 4, 2
PROMPT = torch.tensor([[40, 3, 3, 17, 60, 8, 21, 4, 33, 12, 59, 6]])
IDENTITIES = 4
"""Identity experts of longcat_flash, whose ids come after the real ones."""

# An experts module, by the parameters of its forward, or a router that transformers declares.
IS_MIXTURE = re.compile(
    r"def forward\(\s*self,\s*hidden_states\b[^,]*,\s*(top_k_index|router_indices)\b|\"router_logits\":"
)
CLASS = re.compile(r"^class (\w+ForCausalLM)\(", re.MULTILINE)

REFUSED = {"DogeForCausalLM": "its experts are pairs of keys, which its router's logits do not name"}
HOLES = ("longcat_flash", "zaya")  # where a slot may hold no expert: identity experts, and a class that skips
RULES: dict[str, Any] = {
    r"(un)?(padded_)?vocab_size(_per_layer_input)?": VOCAB,
    r"hidden_size|d_model": HIDDEN,
    r"\w*(intermediate_size|ffn_hidden_size)\w*": WIDTH,
    r"num_hidden_layers|n_layers": LAYERS,
    r"num_layers": LAYERS // 2,  # longcat_flash: each holds two attentions
    # As many heads for keys as for queries: what multi-head latent attention wants, and all others allow.
    r"(swa_)?num_(attention|key_value)_heads|(index_)?n_heads|(linear|mamba)_(num|n)_(key_|value_)?heads": 4,
    r"(swa_|linear_|linear_key_|linear_value_|index_|v_|qk_nope_|qk_rope_)?head_dim|kv_channels": HIDDEN // 4,
    r"(q|kv|o)_lora_rank|gated_norm_rank|hc_lowrank|router_hidden_size|d_rel|hidden_size_per_layer_input": 16,
    r"o_groups|n_layers_per_attn_res_block": 2,
    r"mamba_(d_head|head_dim)": 2 * HIDDEN // 4,
    r"mamba_d_state|ssm_state_size|mamba_dt_rank|(mamba_)?chunk_size": 16,
    r"n_groups|mamba_n_groups": 1,
    r"(moe_)?num_(local_)?experts|n_routed_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts": TOP_K,
    r"n_group|num_expert_group": GROUPS,
    r"topk_group": GROUPS_CHOSEN,
    r"zero_expert_num": IDENTITIES,
    r"(moe_)?n(um)?_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"max_position_embeddings|max_seq_len|model_max_length|rel_extent": 128,
    r"initializer_range": 0.1,  # tokens that differ
}
"""What a field of a configuration is, by its name."""
# What no rule on a field's name can know, by folder.
HALF_ATTENTION = ["linear_attention", "full_attention"] * (LAYERS // 2)
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # By default so few layers are but linear attention; generation wants one that is not.
    "bailing_hybrid": {"layer_group_size": 2},
    "granitemoehybrid": {"layer_types": HALF_ATTENTION},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear": {"layer_types": HALF_ATTENTION},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},  # it has no default
    # Sizes lie in configurations of their own; the default of the attention's lacks a field.
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    "gemma4": {"enable_moe_block": True},  # dense by default
    "mimo_v2_flash": {"num_key_value_heads": 2},  # layers of sliding attention have twice as many
    # All of its attention but the linear is indexed, by an indexer without default.
    "qwen4_exp": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    # It refuses more than one; and its router is three maps deep.
    "zaya": {"num_experts_per_tok": 1, "initializer_range": 0.5},
}  # fmt: skip


@cache
def mixtures() -> dict[str, str]:
    """Return the text of each modeling file of a mixture, by its folder in ``transformers.models``."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    paths = sorted(Path(spec.submodule_search_locations[0]).glob("models/*/modeling_*.py"))
    texts = {path.parent.name: path.read_text(encoding="utf-8") for path in paths}
    return {folder: text for folder, text in texts.items() if IS_MIXTURE.search(text)}


@cache
def architectures() -> dict[str, str]:
    """Return the folder of every class that is a causal language model and a mixture."""
    return {name: folder for folder, text in mixtures().items() for name in CLASS.findall(text)}


def model_class(name: str) -> Any:
    """Import a class of `architectures`."""
    folder = architectures()[name]
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def tiny_config(name: str, **more: Any) -> Any:
    """Return a configuration of a class by `RULES`, `EXCEPTIONS` of its folder, and what is given."""
    kind = model_class(name).config_class
    told: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name_of_field in (field.name for field in dataclasses.fields(kind)):
        for pattern, value in RULES.items():
            if re.fullmatch(pattern, name_of_field):
                told[name_of_field] = value
    return kind(**(told | EXCEPTIONS.get(architectures()[name], {}) | more))


def tiny_model(name: str, **more: Any) -> Any:
    """Build a class, in evaluation mode, with the biases and tables that its training would have given it."""
    config = tiny_config(name, **more)
    torch.manual_seed(0)
    model = model_class(name)(config).eval()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        last, rows = key.rpartition(".")[2], len(tensor) if tensor.ndim else 0
        names = {1: "bias", 2: "router|gate"}.get(tensor.ndim)
        if EXPERTS <= rows <= EXPERTS + IDENTITIES and names and re.search(names, key) and ".experts." not in key:
            # A router's weights, so that it distinguishes tokens, and its biases, of logits or of the selection: some
            # are zero in a fresh model, which hides their effect.
            nn.init.normal_(tensor.data, std=0.5)
        if last == "tid2eid":  # hash routing: which experts a token has; fresh, the first one TOP_K times
            tensor.copy_(torch.stack([torch.randperm(EXPERTS)[: tensor.shape[1]] for _ in tensor]))
    return model


def groups(model: Any) -> bool:
    """Whether the routers of a model choose groups of experts before experts."""
    return any((getattr(model.config, name, None) or 1) > 1 for name in ("n_group", "num_expert_group"))
