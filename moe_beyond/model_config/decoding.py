"""Weights outside the MoE layers, and the KV cache: what decoding reads besides the MoE layers' weights."""

from moe_beyond.model_config.families import WIDTH, Family
from moe_beyond.model_config.fields import Config

PLAIN_ATTENTION = {
    "dbrx", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe",
    "granitemoeshared", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "qwen3_omni_moe_text", "qwen3_vl_moe_text", "solar_open",
}  # fmt: skip
"""Architectures whose layers all have softmax attention, grouped-query or DeepSeek's low-rank, and no other cache."""
FULL, SLIDING = "full_attention", "sliding_attention"


def attention_params(config: Config, hidden: int) -> int:
    """Count the parameters of softmax attention, grouped-query or DeepSeek's low-rank (arXiv 2405.04434, 2.1).

    Args:
        config: Configuration of the model.
        hidden: Hidden size of the model.

    Raises:
        UserError: The configuration has no number of attention heads.
    """
    heads = config.number(("num_attention_heads", "n_heads"))
    if heads is None:
        raise config.error("the number of attention heads is missing (field num_attention_heads)")
    rank = config.number("kv_lora_rank")
    if rank is None:
        return 2 * hidden * _head(config, hidden, heads) * (heads + _kv_heads(config, heads))
    plain, rotary, value = (
        config.number(name, least=0) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    query = heads * (plain + rotary)
    query_rank = config.number("q_lora_rank")
    queries = hidden * query if query_rank is None else query_rank * (hidden + query)
    keys_and_values = hidden * (rank + rotary) + rank * heads * (plain + value)
    return queries + keys_and_values + heads * value * hidden


def outside_params(config: Config, family: Family, hidden: int, dense_layers: int) -> int | None:
    """Count the parameters of dense layers and head; None if a field is missing or a dense layer is of another kind.

    Args:
        config: Configuration of the model.
        family: Family of its architecture.
        hidden: Hidden size of the model.
        dense_layers: Number of layers without experts.
    """
    vocabulary = config.number("vocab_size")
    if vocabulary is None:
        return None
    if dense_layers == 0:
        return vocabulary * hidden
    width = None if set(WIDTH) & set(family.width) else config.number(WIDTH)
    if width is None or not _is_plain(config):
        return None
    return vocabulary * hidden + dense_layers * (attention_params(config, hidden) + family.matrices * hidden * width)


def kv_values_per_token(config: Config, hidden: int, depth: int) -> int | None:
    """Count the numbers in the KV cache per token of context; None if the architecture has other caches.

    DeepSeek's low-rank attention keeps its latent vector and the rotary part of the key. Layers with a sliding window
    are left out.

    Args:
        config: Configuration of the model.
        hidden: Hidden size of the model.
        depth: Number of layers.
    """
    kinds = config.fields.get("layer_types")
    window = config.fields.get("sliding_window") if config.fields.get("use_sliding_window", True) else None
    longest = config.fields.get("max_position_embeddings")
    if not _is_plain(config):
        return None
    if isinstance(kinds, list):
        if len(kinds) != depth or any(kind not in (FULL, SLIDING) for kind in kinds):
            return None
        depth = kinds.count(FULL)
    elif isinstance(window, int) and not (isinstance(longest, int) and window >= longest):
        return None
    if (rank := config.number("kv_lora_rank")) is not None:
        return depth * (rank + (config.number("qk_rope_head_dim", least=0) or 0))
    heads = config.number(("num_attention_heads", "n_heads"))
    return None if heads is None else 2 * depth * _kv_heads(config, heads) * _head(config, hidden, heads)


def _is_plain(config: Config) -> bool:
    return config.fields.get("model_type") in PLAIN_ATTENTION


def _head(config: Config, hidden: int, heads: int) -> int:
    return config.number(("head_dim", "kv_channels")) or max(1, hidden // heads)


def _kv_heads(config: Config, heads: int) -> int:
    return config.number(("num_key_value_heads", "kv_n_heads")) or heads
