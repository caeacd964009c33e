"""Refusing fields whose names suggest an effect on the layout of experts, and that no rule reads."""

import re
from collections.abc import Mapping
from typing import Any

from moe_beyond.model_config import layers
from moe_beyond.model_config.families import (
    ACTIVATION,
    EXPERT_WIDTHS,
    EXPERTS,
    SHARED,
    SHARED_COUNT,
    TOP_K,
    Family,
)
from moe_beyond.model_config.fields import Config
from moe_beyond.safe_text import printable, shown

_ABOUT = re.compile(
    r"expert|moe|sparse|dense|mlp|ffn|feed_?forward|intermediate|hybrid|block_type|mixture|pattern|(^|_)glu|glu$|gated$"
)
_OTHER_PARTS = re.compile(
    r"^(mtp|num_nextn|nextn|index|vision|audio|image|rope|quant)|attn|attention|mamba|sliding|layer_?norm|(^|_)kv(_|$)"
)
_PLAIN = re.compile(
    r"^(add_|use_|with_)?(linear_|fc_|proj_)?bias(_linear)?$|"
    r"^(d_ffn?|dff|dim_ff|ff_?dim|ff_size|n_inner|d_inner|inner_(dim|size)|hidden_dim)$|"
    r"^(hidden_|decoder_|model_)?(layer|block)s?(_(config|spec|override|setting|param|layout|list|map)\w*)?$|"
    r"(skip|drop|prun|remov|exit|shar|reus|repeat|loop|hash)\w*_(layer|block)|"
    r"(layer|block)s?_(\w+_)?(to_)?(skip|drop|prun|remov|exit|shar|reus|repeat|loop)"
)
"""Names without a word for experts: biases, widths, settings per layer, layers that are skipped or reused."""
_SWITCH = re.compile(
    r"gated|glu|"
    r"^((use|is|has|with|enabled?|moe|sparse|experts?|mixture|of|mlp|ffn|feed|forward|layers?|blocks?)(_|$))+$"
)
"""Names of switches of gated experts; switching one off changes the layout."""
_LAYOUT = re.compile(
    r"layer|num|^n_|_n_|count|size|width|dim|freq|interval|(^|_)(step|period|offset|start|end|only|rank|bias|skip)|"
    r"pattern|types|latent|hidden|matri|top_?k|every|glu|gated|(mlp|ffn|expert|experts)_type$"
)
_ROUTING = re.compile(
    r"rout|gat(e|ing)|aux|loss|coef|scal|norm|scor|jitter|dtype|drop|capacity|eps$|backend|kernel|impl|parallel|"
    r"dispatch|balanc|temperature|clamp|limit|alpha|beta|softcap|fp32|fp8|overlap|group|combin|selection|sink|weight"
)
HARMLESS = {
    "aux_loss_alpha", "chunk_size_feed_forward", "enable_moe_fp32_combine", "ep_size", "expert_selection_fn",
    "moe_router_bias_update_rate", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor",
    "moe_use_aux_free", "n_group", "num_expert_group", "num_expert_groups", "num_experts_per_group",
    "router_hidden_size", "use_double_wide_mlp", "use_expert_bias", "zero_expert_num", "zero_expert_type",
}  # fmt: skip
"""Fields whose names match `_LAYOUT`, without an effect on the layout."""
DENSE_WIDTHS = {
    "dense_intermediate_size", "ffn_hidden_size", "intermediate_size", "intermediate_size_mlp",
    "prefix_dense_intermediate_size",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_moe": (True,), "moe_layer_num_skipped": (0,), "use_moe": (True,), "mlp_bias": (True, False),
}  # fmt: skip
"""Name -> values of a field that do not change the layout."""


def check_nothing_else(config: Config, family: Family) -> None:
    """Refuse fields whose names suggest an effect on the layout, and that no rule reads.

    Args:
        config: Configuration of the model.
        family: Family of its architecture.

    Raises:
        UserError: There is such a field.
    """
    read = {
        *EXPERTS, *TOP_K, *EXPERT_WIDTHS, *DENSE_WIDTHS, *SHARED, *SHARED_COUNT, *ACTIVATION, *HARMLESS,
        *family.ignores, *family.inner, *(name for rule in (*layers.ALL, *family.rules) for name in rule.fields),
    }  # fmt: skip
    for name, value in config.fields.items():
        if name in read or not lays_out(name) or value in ([], {}) or (value is False and not _SWITCH.search(name)):
            continue
        if any(value is neutral for neutral in NEUTRAL.get(name, ())) or (value == 0 and _PLAIN.search(name)):
            continue
        if name == "glu" and value is True and family.matrices == 3:
            continue
        raise config.error(
            f"{printable(name)} (got {shown(value)}) is not understood, and may change the layout of experts"
        )
    by_layer = config.fields.get("per_layer_config")
    for layer, changes in by_layer.items() if isinstance(by_layer, Mapping) else ():
        for name in changes if isinstance(changes, Mapping) else ():
            if name in read - HARMLESS or lays_out(name):
                raise config.error(
                    f"per_layer_config of layer {shown(layer)} sets {shown(name)}; experts must not differ"
                )


def lays_out(name: str) -> bool:
    """Return whether the name of a field suggests an effect on the layers, number, width or matrices of experts.

    Args:
        name: Name of the field.

    Example:
        >>> [lays_out(name) for name in ("moe_every_nth_layer", "use_gated_mlp", "moe_gate", "router_aux_loss_coef")]
        [True, True, False, False]
        >>> [lays_out(name) for name in ("block_configs", "skip_layers", "num_kv_shared_layers")]
        [True, True, False]
    """
    if _OTHER_PARTS.search(name):
        return False
    if _PLAIN.search(name):
        return True
    if not _ABOUT.search(name):
        return False
    return bool(_LAYOUT.search(name)) or not _ROUTING.search(name)
