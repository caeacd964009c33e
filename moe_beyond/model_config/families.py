"""The configuration fields that each architecture reads, as transformers 5 builds the modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_beyond.model_config.fields import MOST_LAYERS, Config
from moe_beyond.model_config.layers import (
    BLOCK_TYPES,
    DENSE_COUNT,
    DENSE_INDEX,
    FIRST,
    FIRST_AND_FREQUENCY,
    HASHED_TYPES,
    INTERLEAVED,
    LISTED,
    MASK,
    PERIOD,
    RANGE,
    STEP,
    SWITCH,
    TYPES,
    Rule,
    all_but,
)
from moe_beyond.safe_text import shown

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
WIDTH, NARROW, LONGCAT = ("intermediate_size",), ("moe_intermediate_size",), ("expert_ffn_hidden_size",)
EXPERT_WIDTHS = (*NARROW, *LONGCAT)
"""Fields that always contain the width of an expert; `WIDTH` may be that of dense layers."""
SHARED = (
    "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
)  # fmt: skip
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
PLAIN_ACTIVATIONS = {
    "silu", "swish", "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6",
    "sigmoid", "softplus", "tanh", "xielu",
}  # fmt: skip
GATED_ACTIVATIONS = {"swiglu", "swigluoai", "geglu", "reglu"}


@dataclass(frozen=True)
class Family:
    """The way in which an architecture's code reads its configuration.

    Attributes:
        rules: Rules for the layers with experts: the first whose fields are set applies, otherwise the last with
            ``defaults``.
        defaults: Defaults of the rules' fields.
        width: Fields with the width of an expert; if several are set, they must agree.
        inner: Fields with the input width of an expert, if it can differ from the hidden size.
        matrices: Matrices per expert: three with a gate, two without.
        biases: Function of hidden size and width that returns the number of biases per expert.
        always: Fields with the widths of a dense block parallel to the experts. Without them, the fields of shared
            experts are read.
        attentions: Attention blocks per MoE layer.
        ignores: Fields whose names suggest an effect on experts, and that have none.
        prepare: Function that rewrites fields of this architecture into common ones.
    """

    rules: tuple[Rule, ...] = (all_but(0),)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    width: tuple[str, ...] = NARROW
    inner: tuple[str, ...] = ()
    matrices: int = 3
    biases: Callable[[int, int], int] = lambda hidden, width: 0
    always: tuple[str, ...] = ()
    attentions: int = 1
    ignores: tuple[str, ...] = ()
    prepare: Callable[[Config], Config] = lambda config: config


PARTS_OWN = ("hidden_size", "model_type")
"""Fields of DBRX's parts that do not describe the model."""


def _without_parts(config: Config) -> Config:
    """Merge the partial configurations of DBRX, which contain its sizes."""
    flat = dict(config.fields)
    for part in ("attn_config", "ffn_config"):
        if not isinstance(inner := flat.pop(part, {}), Mapping):
            raise config.error(f"{part} must be an object (got {shown(inner)})")
        fields = {name: value for name, value in inner.items() if value is not None and name not in PARTS_OWN}
        for name in ("ffn_hidden_size", *EXPERTS, *TOP_K):
            if name in fields and name in config.fields and config.fields[name] != fields[name]:
                raise config.error(f"{name} {shown(config.fields[name])} and {part}.{name} contradict")
        flat |= fields
    if "ffn_act_fn" in flat:
        function = flat.pop("ffn_act_fn")
        flat["hidden_act"] = function.get("name") if isinstance(function, Mapping) else function
    return Config(flat, config.source)


def _with_dense_width(config: Config) -> Config:
    """Read ``intermediate_size`` of Inkling as the experts' width if the dense layers have their own field."""
    if "dense_intermediate_size" not in config or "intermediate_size" not in config:
        return config
    return Config({**config.fields, "moe_intermediate_size": config.fields["intermediate_size"]}, config.source)


def _with_heads(config: Config) -> Config:
    """Count the heads of JetMoE, whose attention is an MoE too: each expert has as many heads as key heads."""
    kv_heads, top_k = config.number("num_key_value_heads"), config.number(TOP_K)
    heads = {} if kv_heads is None or top_k is None else {"num_attention_heads": kv_heads * top_k}
    return config.over(heads)


def _with_double_layers(config: Config) -> Config:
    """Count the layers of Longcat, which have two attentions; each of these counts as a hidden layer."""
    depth = config.required("the number of layers", "num_layers", most=MOST_LAYERS)
    if (hidden_layers := config.number("num_hidden_layers")) not in (None, 2 * depth):
        raise config.error(f"num_hidden_layers {hidden_layers} is not twice num_layers {depth}")
    return Config({**config.fields, "num_hidden_layers": depth}, config.source)


def _with_depth(config: Config) -> Config:
    """Count the layers of Nemotron-H: one per letter of its pattern."""
    blocks = next((config.fields[name] for name in BLOCK_TYPES.fields if name in config), None)
    if not isinstance(blocks, list | str):
        raise config.error(f"the layers with experts are missing (field {' or '.join(BLOCK_TYPES.fields[:2])})")
    return config.over({"num_hidden_layers": len(blocks)})


def _leading(count: int, *rules: Rule) -> Family:
    """Return a family whose first layers are dense by default, by ``first_k_dense_replace`` or other rules."""
    return Family((*rules, FIRST), {"first_k_dense_replace": count})


def _by_code(dense: int, *rules: Rule) -> Family:
    """Return a family whose code makes the first layers dense, unless ``rules`` apply."""
    return Family((*rules, all_but(dense)))


_FREQUENT = Family((TYPES, FIRST_AND_FREQUENCY), {"first_k_dense_replace": 1, "moe_layer_freq": 1})
_STEPPED = Family((STEP,))
_WIDE = Family(width=WIDTH)
_MINIMAX = ("mlp_intermediate_size", "shared_moe_mode")  # of a shared expert that published files switch off

FAMILIES: dict[str, Family] = {
    "afmoe": Family((DENSE_COUNT,), {"num_dense_layers": 1}),
    "aria_text": _WIDE,
    "axk1": _FREQUENT,
    "axk2": _FREQUENT,
    "bailing_hybrid": _leading(2, TYPES),
    "beam": _by_code(3, TYPES),
    "cohere2_moe": Family((TYPES, FIRST), {"first_k_dense_replace": 0}, WIDTH),
    "dbrx": Family(width=("ffn_hidden_size",), prepare=_without_parts),
    "deepseek_v2": _leading(0),
    "deepseek_v3": _leading(3),
    "deepseek_v32": _leading(3, TYPES),
    "deepseek_v4": Family(
        (HASHED_TYPES, all_but(0)), width=(*NARROW, *WIDTH), always=NARROW, ignores=("num_hash_layers",)
    ),  # layers of experts too
    "dots1": _leading(0),
    "dots3_note_text": _FREQUENT,
    "ernie4_5_moe": Family((RANGE,), {"moe_layer_start_index": 1}, ignores=("use_bias",)),  # of dense layers
    "exaone_moe": _leading(1, TYPES),
    "flex_olmo": _WIDE,
    "flint": Family((STEP,), {"mlp_only_layers": [0, 1]}),
    "gemma4_text": Family((SWITCH,), always=WIDTH),
    "glm4_moe": _leading(1),
    "glm4_moe_lite": _by_code(1, TYPES),
    "glm_moe_dsa": _leading(3, TYPES),
    "gpt_oss": Family(width=WIDTH, biases=lambda hidden, width: hidden + 2 * width),
    "granitemoe": _WIDE,
    "granitemoe_swa": _WIDE,
    "granitemoehybrid": Family(width=WIDTH, ignores=("layers_block_type",)),  # of attention and mamba
    "granitemoeshared": _WIDE,
    "hunyuan_v1_moe": Family(width=WIDTH, always=WIDTH, ignores=("dense_list", "use_mixed_mlp_moe")),  # of a classifier
    "hy_v3": _by_code(1, TYPES),
    "hy_v4": _by_code(1, TYPES),
    "inkling_text": Family((TYPES, DENSE_INDEX), {"dense_mlp_idx": 0}, prepare=_with_dense_width),
    "inkling2_text": Family(width=(*NARROW, *WIDTH)),
    "jamba": Family((PERIOD,), {"expert_layer_period": 2, "expert_layer_offset": 1}, WIDTH),
    "jetmoe": Family(width=WIDTH, prepare=_with_heads),
    "kimi_linear": _leading(1, TYPES),
    "kolibri1": Family(),
    "laguna": _by_code(1, TYPES),
    "lfm2_moe": Family((DENSE_COUNT,), {"num_dense_layers": 2}),
    "llama4_text": Family((LISTED, INTERLEAVED), width=WIDTH, always=WIDTH),
    "longcat_flash": Family(
        width=(*LONGCAT, *NARROW), always=("ffn_hidden_size",) * 2, attentions=2, prepare=_with_double_layers
    ),
    "mellum": _by_code(0, TYPES),
    "mimo_v2_flash": Family((TYPES, all_but(1)), ignores=("hybrid_layer_pattern", "hybrid_block_size")),  # of attention
    "minimax": Family(width=WIDTH, ignores=_MINIMAX),
    "minimax_m2": Family(width=WIDTH, ignores=_MINIMAX),
    "minimax_m3_vl_text": Family((TYPES, MASK, all_but(0)), width=WIDTH),
    "mistral4": _leading(0),
    "mixtral": _WIDE,
    "nemotron_h": Family(
        (BLOCK_TYPES,),
        matrices=2,
        inner=("moe_latent_size",),
        always=("moe_shared_expert_intermediate_size",),
        attentions=0,
        ignores=("use_bias",),  # of state-space layers
        prepare=_with_depth,
    ),
    "olmoe": _WIDE,
    "phimoe": _WIDE,
    "qwen2_moe": _STEPPED,
    "qwen3_5_moe_text": Family(),
    "qwen3_moe": _STEPPED,
    "qwen3_next": _STEPPED,
    "qwen4_exp_text": Family(),
    "solar_open": Family(),
    "zaya": Family(),
}
"""By ``model_type``, as transformers 5 builds them."""
NOT_ROUTED = {"doge": "its experts are pairs of keys, which no router chooses one by one"}
