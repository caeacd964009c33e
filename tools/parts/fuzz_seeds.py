"""Part of `fuzz.py`: models, and the valid inputs that are changed, as data."""

from dataclasses import replace

from moe_beyond.geometry import PRESETS, Geometry
from moe_beyond.simulator.devices import DEVICES

LARGE = PRESETS["deepseek-v2-lite"].geometry
SMALL = Geometry("small", (1, 2, 3), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=0)
"""A geometry whose layer 0 is dense."""
MIXED = Geometry("mixed", (0, 1), 4, 1, 0, 0, expert_bytes=(300, 200), other_bytes=(0, 10))
SETTINGS = (
    {"prefetch": "none", "lookahead": "1", "lookaheads": "", "misses": "move", "device": ""},
    {"prefetch": "top6", "lookahead": "1", "lookaheads": "1,2", "misses": "move", "device": ""},
    {"prefetch": "top2,p>0.1@2", "lookahead": "token", "lookaheads": "1,token,next", "misses": "move", "device": ""},
    {"prefetch": "adaptive,p>0.1", "lookahead": "token", "lookaheads": "token", "misses": "best", "device": "rtx3060"},
    {"prefetch": "moe_infinity", "lookahead": "2", "lookaheads": "2", "misses": "cpu", "device": "rtx4060-laptop"},
    {"prefetch": "top2", "lookahead": "computed", "lookaheads": "computed,1", "misses": "move", "device": "rtx3060"},
    {"prefetch": "oracle", "lookahead": "0", "lookaheads": "0,1", "misses": "move", "device": "jetson-agx-orin"},
)  # fmt: skip
DEVICE_FILES = (
    {"base": "rtx3060", "link_gb_per_s": 12.5},
    {"link_gb_per_s": 25, "link_latency_us": 20, "memory_gb": 12, "memory_gb_per_s": 360, "name": "mine"},
    replace(DEVICES["rtx4060-laptop-16gb"], other_ms=0.2, expert_ms=0.1, overlap=0.5).to_json(),
    DEVICES["rtx4060-laptop"].to_json(),
)
STRATEGY_FILES = (
    {"budget": "10%"},
    {"budget": 16, "policy": "belief", "prefetch": "top6,p>0.1", "lookahead": 1, "scope": "global", "misses": "best"},
    {
        "budget": "2.9GB",
        "policy": "lru",
        "prefetch": "adaptive",
        "lookahead": "token",
        "predictor": "eamc",
        "profile": "p",
    },
)
PIN_FILES = (
    {"model": "small", "budget_slots": 9, "counted_on": "traces", "num_experts": 8, "expert_bytes": None,
     "uses_share": 0.5, "layers": {"1": [7, 0, 3], "2": [], "3": [1, 0, 2, 3, 4, 5]}},
    {"model": "mixed", "budget_slots": 3, "counted_on": "profile", "num_experts": 2, "expert_bytes": [300, 200],
     "uses_share": 1, "layers": {"0": [1, 0], "1": [1]}},
)  # fmt: skip
CONFIG_FILES = (
    {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 1000, "hidden_act": "silu", "sliding_window": None, "max_position_embeddings": 4096,
    },
    {
        "model_type": "deepseek_v2", "hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 64,
        "num_hidden_layers": 9, "n_routed_experts": 24, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "num_attention_heads": 4, "vocab_size": 2048,
    },
    {
        "model_type": "qwen2_moe", "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 128,
        "shared_expert_intermediate_size": 64, "num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2,
        "decoder_sparse_step": 2, "mlp_only_layers": [1], "num_attention_heads": 4, "head_dim": 16, "vocab_size": 100,
    },
    {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_local_experts": 8, "experts_per_token": 2, "num_attention_heads": 4, "vocab_size": 500,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128,
    },
    {
        "model_type": "nemotron_h", "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "hybrid_override_pattern": "ME*E-E", "mlp_hidden_act": "relu2",
        "moe_shared_expert_intermediate_size": 64,
    },
    {
        "model_type": "dbrx", "d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 100,
        "attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    {
        "model_type": "ernie4_5_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 6,
        "moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 4,
        "moe_layer_interval": 1, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 10,
    },
    {
        "model_type": "glm4v_moe", "vision_config": {"hidden_size": 8}, "text_config": {
            "model_type": "glm4_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4,
            "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "first_k_dense_replace": 1,
        },
    },
    {
        "model_type": "new", "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "num_attention_heads": 4, "moe_layer_freq": [0, 1, 1, 1], "hidden_act": "silu",
    },
)  # fmt: skip
STEERINGS = ({"on": [[1, 0], [2, 7]], "off": [[3, 1], [3, 2]]}, {"off": [[1, 0]]})
CONFIGS = (
    {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 8, "gradient_clip_val": 1.0, "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/recall_at_k", "mode": "max"}},
                {"class_path": "CacheReplay", "init_args": {"budget": "10%", "budgets": ["20%", "30%"]}},
            ], "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "predictor"}}],
        },
        "model": {"class_path": "CrossLayerTask", "init_args": {"width": 16, "heads": 2}},
        "data": {"class_path": "TraceDataModule", "init_args": {"traces": "traces", "token_budget": 512}},
    },
    {"model": {"class_path": "EamcTask"}, "trainer": {"max_epochs": 1, "logger": False}},
)  # fmt: skip
CONFIGS[0].pop("seed_everything")
PROMPTS = (
    [{"text": "a b c"}, {"text": "d", "id": "one"}, {"prompt": "e", "other": 1}],
    [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, {"id": 3, "text": "x"}],
    [{"conversations": [{"from": "human", "value": "hi"}]}, {"instruction": "do", "input": "this", "context": None}],
    ["plain", [{"role": "user", "content": "chat"}], {"question": "why?", "id": 1.5}],
)
GEOMETRIES = (SMALL.to_json(), MIXED.to_json(), LARGE.to_json())
