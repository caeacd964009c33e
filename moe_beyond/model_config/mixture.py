"""The mixture of experts that a configuration describes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.fields import shown
from moe_beyond.model_config import layers as ways
from moe_beyond.model_config.families import (
    ACTIVATION,
    EXPERT_WIDTHS,
    EXPERTS,
    FAMILIES,
    GATED_ACTIVATIONS,
    NOT_ROUTED,
    PLAIN_ACTIVATIONS,
    SHARED,
    SHARED_COUNT,
    TOP_K,
    WIDTH,
    Family,
)
from moe_beyond.model_config.fields import MOST_LAYERS, Config, Layers
from moe_beyond.model_config.unread import check_nothing_else, lays_out

MOST_EXPERTS = 32_767
"""Most experts that 16-bit ids can name."""
DEPTH = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "decoder_layers", "num_blocks",
    "n_blocks",
)  # fmt: skip
PARTS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Parts that write text, or hold one that does."""
BY_HAND = "write a geometry file by hand (`moe-beyond import --help` shows its fields)"


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts of a configuration.

    Attributes:
        name: Name of the model in the configuration.
        moe_layers: Indices of the layers that hold experts, ascending.
        num_experts: Routed experts per such layer, E; identity and skip experts are not counted.
        top_k: Experts per token and layer, K.
        params_per_expert: Parameters of one expert, with its biases where it has any.
        other_params_per_layer: Parameters of attention, router and shared experts of such a layer: an estimate.
        vocab_size: Rows of the embedding; None where the configuration does not say.
    """

    name: str
    moe_layers: Layers
    num_experts: int
    top_k: int
    params_per_expert: int
    other_params_per_layer: int
    vocab_size: int | None


def read_mixture(content: Mapping[str, Any], source: str = "config.json") -> Mixture:
    """Read the mixture of experts out of a model's configuration.

    Args:
        content: The configuration as JSON holds it. That of a model that also reads pictures may hold its language
            model's under ``text_config``, or ``thinker_config.text_config``.
        source: Path or name of the origin, for error messages.

    Raises:
        UserError: It names no routed experts; or a field that says which layers hold experts, how many, how wide or of
            how many matrices is missing, contradicts another one, or is not understood.
    """
    name = next((n for n in map(content.get, ("_name_or_path", "name_or_path")) if isinstance(n, str) and n), None)
    config = _language_model(Config({k: v for k, v in content.items() if v is not None}, source))
    kind = config.fields.get("model_type")
    if not isinstance(kind, str | None):
        raise config.error(f"model_type must be a string (got {shown(kind)})")
    if kind in NOT_ROUTED:
        raise config.error(f"model_type {kind}: {NOT_ROUTED[kind]}")
    family = FAMILIES.get(kind or "")
    if family is not None:
        config = family.prepare(config)
    if all(config.fields.get(name, 0) == 0 for name in EXPERTS):
        raise _no_experts(config)
    depth = config.required("the number of layers", DEPTH, most=MOST_LAYERS)
    if family is None:
        family = _common_family(config, kind, depth)
    experts = config.required("the number of experts", EXPERTS, most=MOST_EXPERTS, depth=depth)
    top_k = config.required("the number of experts per token", TOP_K, most=MOST_EXPERTS, depth=depth)
    hidden = config.required("the hidden size", ("hidden_size", "d_model", "n_embd"))
    inner = config.number(family.inner) or hidden
    width = _expert_width(config, family, depth)
    layers = _moe_layers(config, family, depth)
    _check_activation(config, family)
    check_nothing_else(config, family)
    return Mixture(
        name=name or kind or source,
        moe_layers=layers,
        num_experts=experts,
        top_k=top_k,
        params_per_expert=family.matrices * inner * width + family.biases(hidden, width),
        other_params_per_layer=_other_params(config, family, hidden, width, depth)
        + hidden * experts
        + (2 * hidden * inner if inner != hidden else 0),
        vocab_size=config.number("vocab_size"),
    )


def _language_model(config: Config) -> Config:
    """Return the configuration of the part that writes text."""
    parts = [name for name in PARTS if name in config]
    if not parts:
        return config
    if len(parts) > 1 or any(name in config for name in EXPERTS):
        raise config.error(f"has experts in {' and '.join([*parts, 'itself'][:2])}; cut it down to one of them")
    if not isinstance(part := config.fields[parts[0]], Mapping):
        raise config.error(f"{parts[0]} must be an object (got {shown(part)})")
    return _language_model(Config({k: v for k, v in part.items() if v is not None}, config.source))


def _no_experts(config: Config) -> UserError:
    """Say why no experts are found: a field or a part that is not understood, or a dense model."""
    for name, value in config.fields.items():
        counts = re.search(r"(num|n)_\w*expert", name) and not re.search(r"shar|activ|group|per_tok", name)
        if counts and type(value) is int and value > 0 and lays_out(name):
            return config.error(f"{name} (got {value}) is not understood, and no known field names experts; {BY_HAND}")
        if isinstance(value, Mapping) and any(value.get(field) for field in EXPERTS):
            return config.error(f"names experts in {name}, which is not known as the part that writes text; {BY_HAND}")
    return config.error("names no routed experts; is this a mixture-of-experts model?")


def _common_family(config: Config, kind: str | None, depth: int) -> Family:
    """Return how to read an architecture that is not in `FAMILIES`: only what is common to many, and nothing implied.

    Raises:
        UserError: A field is missing without which the code of the architecture decides.
    """
    what = f"model_type {shown(kind)} is not known" if kind else "model_type is missing"
    rules = tuple(rule for rule in ways.ALL if rule.is_set(config))
    if not rules:
        raise config.error(
            f"{what}, and no field says which layers hold experts (such as first_k_dense_replace); {BY_HAND}"
        )
    functions = {name: config.fields[name] for name in ACTIVATION if name in config} or {"hidden_act": None}
    if any(function != "silu" for function in functions.values()):
        activations = ", ".join(f"{name} {shown(function)}" for name, function in functions.items())
        raise config.error(
            f"{what}, and {activations} does not say whether an expert has two or three matrices; {BY_HAND}"
        )
    if biases := [name for name in ("mlp_bias", "use_bias") if config.fields.get(name)]:
        raise config.error(f"{what}, and whether experts have biases ({biases[0]}) is not understood; {BY_HAND}")
    layers = set(rules[0].layers(config, depth))
    if any(name in config for name in EXPERT_WIDTHS):
        return Family(rules[:1], width=EXPERT_WIDTHS)
    if len(layers) < depth:
        raise config.error(f"{what}, and no field says how wide an expert is (moe_intermediate_size); {BY_HAND}")
    return Family(rules[:1], width=WIDTH)


def _expert_width(config: Config, family: Family, depth: int) -> int:
    names = family.width
    width = config.required("the width of an expert", names, depth=depth)
    for name in set(EXPERT_WIDTHS) - set(names):
        if config.number(name, depth=depth) not in (None, width):
            raise config.error(
                f"{name} {shown(config.fields[name])} is not the width of an expert that {' or '.join(names)} says "
                f"({width})"
            )
    return width


def _moe_layers(config: Config, family: Family, depth: int) -> Layers:
    """Return which layers hold experts, by the family's rules; other fields must not contradict them."""
    rule = next((rule for rule in family.rules[:-1] if rule.is_set(config)), family.rules[-1])
    layers = tuple(sorted(rule.layers(config.over(family.defaults), depth)))
    read = {name for rule in family.rules for name in rule.fields} | set(family.ignores)
    for other in ways.ALL:
        foreign = [name for name in other.fields if name in config and name not in read]
        foreign = [name for name in foreign if config.fields[name] != ways.NEUTRAL.get(name)]
        if foreign and tuple(sorted(other.layers(config, depth))) != layers:
            raise config.error(
                f"{foreign[0]} {shown(config.fields[foreign[0]])} is not understood here: it would put experts in "
                f"other layers than {' and '.join(rule.fields) or 'the code of this architecture'}; {BY_HAND}"
            )
    if not layers:
        raise config.error("no layer holds experts; is this a mixture-of-experts model?")
    return layers


def _check_activation(config: Config, family: Family) -> None:
    """Check that the activation does not change how many matrices an expert has."""
    for name in ACTIVATION:
        known = PLAIN_ACTIVATIONS | (GATED_ACTIVATIONS if family.matrices == 3 else set())
        if name in config and (not isinstance(act := config.fields[name], str) or act not in known):
            raise config.error(
                f"{name} {shown(config.fields[name])} is not understood; it may change how many matrices an expert has"
            )


def _other_params(config: Config, family: Family, hidden: int, width: int, depth: int) -> int:
    """Estimate a layer's parameters besides its routed experts and their router; norms and biases are not counted."""
    if family.always:
        widths = [config.number(name, depth=depth) or 0 for name in family.always]
    else:
        count = config.number(SHARED_COUNT, least=0, most=MOST_EXPERTS, depth=depth)
        own = config.number(SHARED, least=0, depth=depth)
        widths = [(width if own is None else own) * ((own is not None) if count is None else count)]
    attention = _attention(config, hidden) if family.attentions else 0
    return family.matrices * hidden * sum(widths) + family.attentions * attention


def _attention(config: Config, hidden: int) -> int:
    """Parameters of softmax attention: grouped-query, or with DeepSeek's low-rank maps (arXiv 2405.04434, 2.1)."""
    heads = config.number(("num_attention_heads", "n_heads"))
    if heads is None:
        raise config.error("the number of attention heads is missing (field num_attention_heads)")
    rank = config.number("kv_lora_rank")
    if rank is None:
        head = config.number(("head_dim", "kv_channels")) or max(1, hidden // heads)
        return 2 * hidden * head * (heads + (config.number(("num_key_value_heads", "kv_n_heads")) or heads))
    plain, rotary, value = (
        config.number(name, least=0) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    query = heads * (plain + rotary)
    query_rank = config.number("q_lora_rank")
    queries = hidden * query if query_rank is None else query_rank * (hidden + query)
    keys_and_values = hidden * (rank + rotary) + rank * heads * (plain + value)
    return queries + keys_and_values + heads * value * hidden
