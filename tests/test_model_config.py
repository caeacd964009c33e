"""Configurations of published models, and what is refused of others."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, geometry_from_config, load_preset
from moe_beyond.model_config import layers
from moe_beyond.model_config.families import (
    ACTIVATION,
    EXPERT_WIDTHS,
    EXPERTS,
    FAMILIES,
    SHARED,
    SHARED_COUNT,
    TOP_K,
)

CASES = Path(__file__).parent / "data" / "cases" / "geometry"
QWEN3 = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}
NEMOTRON = json.loads((CASES / "nemotron-3-nano.json").read_text())
UNKNOWN = {**QWEN3, "model_type": "of_tomorrow"}
DEEPSEEK = {
    **{
        k: v for k, v in QWEN3.items() if k not in ("decoder_sparse_step", "mlp_only_layers", "num_experts", "head_dim")
    },
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}


@pytest.mark.parametrize(
    ("name", "moe_layers", "experts", "top_k", "params"),
    [
        (
            "nemotron-3-nano",
            (1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 29, 31, 34, 36, 38, 40, 43, 45, 47, 49, 51),
            128, 6, 2 * 2688 * 1856,
        ),
        ("kimi-linear", tuple(range(1, 27)), 256, 8, 3 * 2304 * 1024),
        ("longcat-flash", tuple(range(28)), 512, 12, 3 * 6144 * 2048),
    ],
)  # fmt: skip
def test_published_files_give_the_published_shapes(name, moe_layers, experts, top_k, params):
    geometry = load_preset(str(CASES / f"{name}.json")).geometry
    assert geometry.moe_layers == moe_layers
    assert (geometry.num_experts, geometry.top_k, geometry.params_per_expert) == (experts, top_k, params)


# What publishers' files hold besides what is read: all fields whose names are about experts, layers or widths.
PUBLISHED = {
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3", "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 3,
            "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
            "seq_aux": True, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
            "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        range(3, 61), 256, 8, 3 * 7168 * 2048,
    ),
    "Kimi-K2": (  # not in transformers: read if no value is implied
        {
            "model_type": "kimi_k2", "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1,
            "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
            "n_shared_experts": 1, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_key_value_heads": 64, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "topk_group": 1, "topk_method": "noaux_tc", "seq_aux": True,
        },
        range(1, 61), 384, 8, 3 * 7168 * 2048,
    ),
    "Ling-mini": (
        {
            "model_type": "bailing_moe_v2", "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
            "head_dim": 128, "intermediate_size": 5120, "moe_intermediate_size": 512,
            "moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size": 512, "n_group": 8,
            "mtp_loss_scaling_factor": 0, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
            "num_hidden_layers": 20, "num_key_value_heads": 4, "num_shared_experts": 1, "num_nextn_predict_layers": 0,
            "router_dtype": "fp32", "score_function": "sigmoid", "topk_group": 4, "use_bias": False,
        },
        range(1, 20), 256, 8, 3 * 2048 * 512,
    ),
    "Hunyuan-A13B": (
        {
            "model_type": "hunyuan_v1_moe", "attention_head_dim": 128, "dense_list": [4096, 0], "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 3072, "kv_lora_rank": None,
            "mlp_bias": False, "moe_drop_tokens": False, "moe_intermediate_size": [3072] * 32,
            "moe_layer_num_skipped": 0, "moe_random_routing_dropped_token": False, "moe_topk": [8] * 32,
            "num_attention_heads": 32, "num_experts": 64, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "num_shared_expert": [1] * 32, "use_mixed_mlp_moe": True, "use_qk_norm": True,
        },
        range(32), 64, 8, 3 * 4096 * 3072,
    ),
    "Llama-4-Maverick": (
        {
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text", "attention_chunk_size": 8192, "attn_temperature_tuning": 4,
                "cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
                "interleave_moe_layer_step": 2, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
                "moe_layers": list(range(1, 48, 2)), "num_attention_heads": 40, "num_experts_per_tok": 1,
                "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 128,
                "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
            },
            "vision_config": {"hidden_size": 1408, "intermediate_size": 5632},
        },
        range(1, 48, 2), 128, 1, 3 * 5120 * 8192,
    ),
    "MiniMax-M2": (
        {
            "model_type": "minimax_m2", "attn_type_list": [1] * 62, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 3072, "intermediate_size": 1536, "mlp_intermediate_size": 8192, "mtp_transformer_layers": 1,
            "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
            "num_local_experts": 256, "num_mtp_modules": 3, "layernorm_mlp_beta": 1.0, "scoring_func": "sigmoid",
            "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "use_mtp": True, "use_routing_bias": True,
        },
        range(62), 256, 8, 3 * 3072 * 1536,
    ),
    "MiMo-V2-Flash": (
        {
            "model_type": "mimo_v2_flash", "hybrid_layer_pattern": [0, *[1] * 47], "hybrid_block_size": None,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 16384, "moe_intermediate_size": 2048,
            "moe_layer_freq": [0, *[1] * 47], "n_routed_experts": 256, "n_shared_experts": None,
            "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "scoring_func": "sigmoid",
        },
        range(1, 48), 256, 8, 3 * 4096 * 2048,
    ),
    "ERNIE-4.5-300B": (
        {
            "model_type": "ernie4_5_moe", "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672,
            "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_group": "mp", "moe_intermediate_size": 3584,
            "moe_k": 8, "moe_layer_end_index": 53, "moe_layer_interval": 1, "moe_layer_start_index": 3,
            "moe_num_experts": 64, "moe_num_shared_experts": 0, "moe_use_aux_free": True, "num_attention_heads": 64,
            "num_hidden_layers": 54, "num_key_value_heads": 8, "use_bias": False,
        },
        range(3, 54), 64, 8, 3 * 8192 * 3584,
    ),
    "Trinity": (
        {
            "model_type": "afmoe", "global_attn_every_n_layers": 4, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 6144, "load_balance_coeff": 0.001, "moe_intermediate_size": 1024,
            "n_group": 1, "num_attention_heads": 32, "num_dense_layers": 2, "num_expert_groups": 1, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_key_value_heads": 4, "num_limited_groups": 1,
            "num_shared_experts": 1, "route_norm": True, "route_scale": 2.826, "score_func": "sigmoid",
            "use_grouped_mm": True,
        },
        range(2, 32), 128, 8, 3 * 2048 * 1024,
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
            "router_aux_loss_coef": 0.9, "swiglu_limit": 7.0, "quantization_config": {"quant_method": "mxfp4"},
        },
        range(24), 32, 4, 3 * 2880 * 2880 + 3 * 2880,
    ),
    "granite-4.0-h-tiny": (
        {
            "model_type": "granitemoehybrid", "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 512,
            "layer_types": ["mamba"] * 40, "mamba_d_head": 64, "num_attention_heads": 12, "num_experts_per_tok": 6,
            "num_hidden_layers": 40, "num_key_value_heads": 4, "num_local_experts": 64,
            "shared_intermediate_size": 1024, "router_aux_loss_coef": 0.0, "normalization_function": "rmsnorm",
        },
        range(40), 64, 6, 3 * 1536 * 512,
    ),
    "dbrx": (
        {
            "model_type": "dbrx", "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
            "d_model": 6144, "n_heads": 48, "n_layers": 40,
            "ffn_config": {
                "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 10752, "moe_jitter_eps": 0.01,
                "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1,
            },
        },
        range(40), 16, 4, 3 * 6144 * 10752,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_as_publishers_write_them_are_read(name):
    config, moe_layers, experts, top_k, params = PUBLISHED[name]
    geometry = geometry_from_config(config)
    assert geometry.moe_layers == tuple(moe_layers)
    assert (geometry.num_experts, geometry.top_k, geometry.params_per_expert) == (experts, top_k, params)


@pytest.mark.parametrize(
    ("config", "moe_layers"),
    [
        (QWEN3, (0, 1, 2, 3, 4, 5)),
        ({**QWEN3, "decoder_sparse_step": 2}, (1, 3, 5)),  # counted from one
        ({**QWEN3, "mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        (DEEPSEEK, (1, 2, 3, 4, 5)),
        ({**DEEPSEEK, "first_k_dense_replace": 3}, (3, 4, 5)),
        ({k: v for k, v in DEEPSEEK.items() if k != "first_k_dense_replace"}, (3, 4, 5)),  # what its code does
        ({**DEEPSEEK, "model_type": "axk1", "moe_layer_freq": 2}, (2, 4)),  # counted from zero
        ({**DEEPSEEK, "model_type": "dots3_note_text", "moe_layer_freq": [0, 1, 0, 1, 1, 0]}, (1, 3, 4)),
        ({**DEEPSEEK, "model_type": "glm4_moe_lite"}, (1, 2, 3, 4, 5)),  # not read there, and right
        ({**UNKNOWN, "decoder_sparse_step": 3}, (2, 5)),
    ],
)
def test_which_layers_hold_experts(config, moe_layers):
    assert geometry_from_config(config).moe_layers == moe_layers


def test_one_number_per_layer_is_one_number_where_they_are_equal():
    assert geometry_from_config({**QWEN3, "num_experts": [8] * 6, "num_experts_per_tok": [2] * 6}).top_k == 2


SWITCHES = (
    "mlp_gated", "use_glu", "gated_mlp", "use_moe", "is_moe", "glu", "use_gated_mlp", "swiglu", "use_swiglu",
    "moe_enabled", "has_moe", "enable_moe", "use_sparse_mlp", "use_experts", "use_moe_layers", "ffn_gated",
)  # fmt: skip
PLAIN: dict[str, object] = {
    "block_configs": [{"ffn": {"intermediate_size": 8}}], "layer_configs": {"0": {}}, "skip_layers": [2],
    "layers_skipped": [2], "num_hash_layers": 2, "layers_to_skip": 1, "num_skipped_layers": 1, "pruned_layers": [1],
    "add_bias_linear": True, "use_bias": True, "bias": True, "linear_bias": True, "d_ff": 256, "n_inner": 256,
    "ff_dim": 256, "inner_dim": 256, "hidden_dim": 256,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PLAIN, "moe_apply_probs_on_input", "moe_dense_residual", "use_expert_parallel"])
@pytest.mark.parametrize("value", [False, None, [], {}])
def test_what_is_neutral_changes_nothing(name, value):
    assert geometry_from_config({**QWEN3, name: value}) == geometry_from_config(QWEN3)


def test_fields_of_published_files_that_agree_are_read():
    jetmoe = {**QWEN3, "model_type": "jetmoe", "glu": True}
    for name in ("moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"):
        jetmoe.pop(name)
    assert geometry_from_config(jetmoe).params_per_expert == 3 * 64 * 256
    exaone = {**QWEN3, "model_type": "exaone_moe", "first_k_dense_replace": 1, "is_moe_layer": [False, *[True] * 5]}
    for name in ("decoder_sparse_step", "mlp_only_layers"):
        exaone.pop(name)
    assert geometry_from_config(exaone).moe_layers == (1, 2, 3, 4, 5)
    text = {**QWEN3, "model_type": "qwen3_omni_moe_text"}
    omni = {
        "model_type": "qwen3_omni_moe",
        "talker_config": {"text_config": {"num_experts": 4}},
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": text, "vision_config": {"depth": 27}},
    }
    assert geometry_from_config(omni) == replace(geometry_from_config(QWEN3), model="qwen3_omni_moe_text")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"model_type": "smallthinker", "moe_num_active_primary_experts": 4, "moe_num_primary_experts": 32},
            r"moe_num_primary_experts \(got 32\) is not understood, and no known field has experts; write a",
        ),
        ({"model_type": "a", "decoder": QWEN3}, "has experts in decoder, which is not known as a language model"),
        ({"model_type": "a", "\r": QWEN3}, r"has experts in \\x0d, which is not known as a language model"),
        (
            {"model_type": "a", "num_hidden_layers": 4},
            "has no routed experts; give the configuration of a mixture-of-experts model",
        ),
    ],
)
def test_the_true_reason_is_given_where_no_experts_are_found(content, says):
    with pytest.raises(UserError, match=says):
        geometry_from_config(content)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # which layers
        ({"first_k_dense_replace": 2}, "first_k_dense_replace 2 is not understood here"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 is not understood here"),
        ({"moe_every_nth_layer": 2}, r"moe_every_nth_layer \(got 2\) is not understood"),
        ({"sparse_layers": [1, 2]}, "sparse_layers .* is not understood"),
        ({"mlp_only_layers": [6]}, "mlp_only_layers must be a list of layers, 0 to 5"),
        ({"mlp_only_layers": 5}, "mlp_only_layers must be a list"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers must be a list"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers must be a list"),
        ({"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, "no layer has experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers must be a whole number of 1 to 10000"),
        ({"num_layers": 7}, "num_hidden_layers 6 and num_layers 7 contradict"),
        ({"per_layer_config": {"1": {"num_experts": 4}}}, "per_layer_config of layer '1' sets 'num_experts'"),
        # how many
        ({"num_experts": [8, 8, 8, 8, 8, 4]}, "num_experts differs by layer"),
        ({"num_experts": [8, 8]}, "num_experts must be one number, or 6"),
        ({"num_experts_per_tok": [1, 2, 2, 2, 2, 2]}, "num_experts_per_tok differs by layer"),
        ({"num_local_experts": 16}, "num_experts 8 and num_local_experts 16 contradict"),
        ({"num_experts": 8.0}, r"num_experts must be a whole number .*got 8\.0"),
        ({"num_experts": True}, "num_experts must be a whole number"),
        ({"num_experts": 10**6}, "num_experts must be a whole number of 1 to 32767"),
        ({"num_experts_per_tok": 9}, r"top_k must be a whole number of 1 to 8 \(got 9\)"),
        ({"num_experts_per_tok": None}, "the number of experts per token is missing"),
        # how wide, and of how many matrices
        ({"moe_intermediate_size": None}, r"the width of an expert is missing \(field moe_intermediate_size\)"),
        ({"expert_ffn_hidden_size": 48}, "expert_ffn_hidden_size must be the width of an expert"),
        ({"hidden_size": -64}, "hidden_size must be a whole number"),
        ({"moe_intermediate_size": "32"}, "moe_intermediate_size must be a whole number"),
        ({"use_gated_mlp": True}, r"use_gated_mlp \(got True\) is not understood"),
        ({"block_pattern": "MEE"}, r"block_pattern \(got 'MEE'\) is not understood"),
        ({"expert_hidden_dim": 48}, r"expert_hidden_dim \(got 48\) is not understood"),
        ({"hidden_act": "soft_swiglu"}, "hidden_act 'soft_swiglu' is not understood"),
        ({"hidden_act": ["silu"]}, "hidden_act .* is not understood"),
        ({"moe_latent_size": 16}, r"moe_latent_size \(got 16\) is not understood"),
        # switched off
        *(({name: False}, rf"{name} \(got False\) is not understood") for name in SWITCHES),
        # what mentions no experts
        *(({name: value}, rf"{name} \(got .*\) is not understood") for name, value in PLAIN.items()),
        ({"num_blocks": 7}, "num_hidden_layers 6 and num_blocks 7 contradict"),
        ({"is_moe_layer": [False, *[True] * 5]}, "is_moe_layer .* is not understood here"),
        ({"is_moe_layer": [True] * 5}, "is_moe_layer must have one value for each of 6 layers"),
        # other fields
        ({"num_attention_heads": None}, "the number of attention heads is missing"),
        ({"head_dim": {}}, "head_dim must be a whole number"),
        ({"model_type": 5}, "model_type must be a string"),
        ({"text_config": []}, "has experts in text_config and itself"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(changes, says):
    with pytest.raises(UserError, match=f"mine: .*{says}|{says}") as error:
        geometry_from_config({**QWEN3, **changes}, source="mine")
    assert str(error.value).startswith("mine: ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hybrid_override_pattern": "MEMX*"}, "hybrid_override_pattern has 'X', which is not understood"),
        ({"hybrid_override_pattern": "ME"}, "hybrid_override_pattern must have one value for each of 52 layers"),
        ({"hybrid_override_pattern": 7}, "hybrid_override_pattern must be a list|the layers with experts are missing"),
        ({"hybrid_override_pattern": None}, "the layers with experts are missing"),
        ({"layers_block_type": ["moe"] * 52}, "hybrid_override_pattern and layers_block_type must .* agree"),
        ({"mlp_hidden_act": "swiglu"}, "mlp_hidden_act 'swiglu' is not understood"),
        ({"n_routed_experts": 0}, "has no routed experts"),
    ],
)
def test_a_pattern_that_is_not_understood_is_refused_by_name(changes, says):
    with pytest.raises(UserError, match=says):
        geometry_from_config({**NEMOTRON, **changes})


def test_latent_experts_are_as_narrow_as_what_they_read():
    geometry = geometry_from_config({**NEMOTRON, "moe_latent_size": 1024})
    assert geometry.params_per_expert == 2 * 1024 * 1856


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decoder_sparse_step": None, "mlp_only_layers": None}, "no field describes the layers with experts"),
        ({"hidden_act": None}, "leaves open whether an expert has two or three matrices"),
        (
            {"mlp_hidden_act": "relu2"},
            "mlp_hidden_act 'relu2' leaves open whether an expert has two or three matrices",
        ),
        ({"hidden_act": "relu"}, "leaves open whether an expert has two or three matrices"),
        ({"mlp_bias": True}, "leaves open whether experts have biases"),
        ({"use_bias": True}, "leaves open whether experts have biases"),
        ({"mlp_only_layers": [0], "moe_intermediate_size": None}, "the width of an expert is missing"),
        (
            {"first_k_dense_replace": 1, "decoder_sparse_step": 2},
            "decoder_sparse_step 2 is not understood here: it contradicts the layers of first_k_dense_replace",
        ),
    ],
)
def test_an_unknown_architecture_is_read_where_nothing_is_implied(changes, says):
    assert geometry_from_config(UNKNOWN).shape() == (6, 8, 2)
    with pytest.raises(UserError, match=says):
        geometry_from_config({**UNKNOWN, **changes})
    without_type = {k: v for k, v in {**UNKNOWN, **changes}.items() if k != "model_type"}
    with pytest.raises(UserError, match=says):
        geometry_from_config(without_type)


def test_doge_is_refused_with_the_reason():
    with pytest.raises(UserError, match="pairs of keys"):
        geometry_from_config({**QWEN3, "model_type": "doge", "is_moe": True})


FIELDS = sorted(
    {*QWEN3, *NEMOTRON, *DEEPSEEK, *EXPERTS, *TOP_K, *EXPERT_WIDTHS, *SHARED, *SHARED_COUNT, *ACTIVATION}
    | {name for rule in (*layers.ALL, layers.BLOCK_TYPES) for name in rule.fields}
    | {"text_config", "ffn_config", "attn_config", "per_layer_config", "_name_or_path", "vocab_size", "kv_lora_rank"}
)
small = st.integers(-2, 9)
values = st.recursive(
    st.none() | st.booleans() | small | st.integers() | st.sampled_from([10**11, -(10**11), 10**4000])
    | st.floats() | st.text(max_size=5) | st.sampled_from(["silu", "ME*-", *FAMILIES]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([QWEN3, NEMOTRON, DEEPSEEK, UNKNOWN, {}]),
    st.sampled_from([None, *FAMILIES]),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), values, max_size=5),
    st.sets(st.sampled_from(FIELDS), max_size=3),
)
def test_any_object_gives_a_geometry_or_one_line_and_quickly(base, kind, changes, without):
    content = {**base, **({} if kind is None else {"model_type": kind}), **changes}
    content = {name: value for name, value in content.items() if name not in without}
    start = time.process_time()
    outcome = geometry_or_message(content)
    assert time.process_time() - start < 5  # a garbage collection within may take one
    if isinstance(outcome, Geometry):
        assert Geometry.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    else:
        assert len(outcome.splitlines()) == 1


def geometry_or_message(content):
    try:
        return geometry_from_config(content)
    except UserError as error:
        return str(error)
