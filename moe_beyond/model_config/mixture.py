"""Reading the geometry of an MoE from a configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.model_config import layers as rules
from moe_beyond.model_config.decoding import attention_params, kv_values_per_token, outside_params
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
from moe_beyond.model_config.unknown_fields import check_nothing_else, lays_out
from moe_beyond.safe_text import printable, shown

MOST_EXPERTS = 32_767
"""Largest number of experts that 16-bit ids can distinguish."""
DEPTH = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "decoder_layers", "num_blocks",
    "n_blocks",
)  # fmt: skip
PARTS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Fields that may contain the configuration of a language model."""
BY_HAND = "write a geometry file by hand (`moe-beyond import --help` shows its fields)"


@dataclass(frozen=True)
class Mixture:
    """The MoE that a configuration describes.

    Attributes:
        name: Name of the model in the configuration.
        moe_layers: Indices of the layers with experts, ascending.
        num_experts: Routed experts per MoE layer, E, without identity and skip experts.
        top_k: Experts per token and layer, K.
        params_per_expert: Parameters of one expert, including its biases if it has any.
        other_params_per_layer: Estimated parameters of attention, router and shared experts per MoE layer.
        outside_params: Parameters of dense layers and head; None if unknown.
        kv_values_per_token: Numbers in the KV cache of all layers per token of context; None if unknown.
        hidden_size: Width of the hidden state.
        vocab_size: Rows of the embedding; None if the configuration has no such field.
    """

    name: str
    moe_layers: Layers
    num_experts: int
    top_k: int
    params_per_expert: int
    other_params_per_layer: int
    outside_params: int | None
    kv_values_per_token: int | None
    hidden_size: int
    vocab_size: int | None


def read_mixture(content: Mapping[str, Any], source: str = "config.json") -> Mixture:
    """Read the MoE that a model's configuration describes.

    Args:
        content: Content of the ``config.json``. A multimodal model may have its language model's configuration under
            ``text_config`` or ``thinker_config.text_config``.
        source: Path or name of the origin, for error messages (default: ``"config.json"``).

    Raises:
        UserError: The configuration has no routed experts; or a field about them is missing, contradicts another one,
            or is not understood.
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
        outside_params=outside_params(config, family, hidden, depth - len(layers)),
        kv_values_per_token=kv_values_per_token(config, hidden, depth),
        hidden_size=hidden,
        vocab_size=config.number("vocab_size"),
    )


def _language_model(config: Config) -> Config:
    """Return the configuration of the language model."""
    parts = [name for name in PARTS if name in config]
    if not parts:
        return config
    if len(parts) > 1 or any(name in config for name in EXPERTS):
        raise config.error(
            f"has experts in {' and '.join(map(printable, [*parts, 'itself'][:2]))}; reduce it to one of them"
        )
    if not isinstance(part := config.fields[parts[0]], Mapping):
        raise config.error(f"{parts[0]} must be an object (got {shown(part)})")
    return _language_model(Config({k: v for k, v in part.items() if v is not None}, config.source))


def _no_experts(config: Config) -> UserError:
    """Explain why no experts are found: a field or a part that is not understood, or a dense model."""
    for name, value in config.fields.items():
        counts = re.search(r"(num|n)_\w*expert", name) and not re.search(r"shar|activ|group|per_tok", name)
        if counts and type(value) is int and value > 0 and lays_out(name):
            return config.error(f"{name} (got {value}) is not understood, and no known field has experts; {BY_HAND}")
        if isinstance(value, Mapping) and any(value.get(field) for field in EXPERTS):
            return config.error(f"has experts in {printable(name)}, which is not known as a language model; {BY_HAND}")
    return config.error("has no routed experts; give the configuration of a mixture-of-experts model")


def _common_family(config: Config, kind: str | None, depth: int) -> Family:
    """Return a family for an architecture that is not in `FAMILIES`: only common fields, and no implied values.

    Raises:
        UserError: A field is missing, so that the code of the architecture decides.
    """
    problem = f"model_type {shown(kind)} is unknown" if kind else "model_type is missing"
    applicable = tuple(rule for rule in rules.ALL if rule.is_set(config))
    if not applicable:
        raise config.error(
            f"{problem}, and no field describes the layers with experts (such as first_k_dense_replace); {BY_HAND}"
        )
    functions = {name: config.fields[name] for name in ACTIVATION if name in config} or {"hidden_act": None}
    if any(function != "silu" for function in functions.values()):
        activations = ", ".join(f"{name} {shown(function)}" for name, function in functions.items())
        raise config.error(
            f"{problem}, and {activations} leaves open whether an expert has two or three matrices; {BY_HAND}"
        )
    if biases := [name for name in ("mlp_bias", "use_bias") if config.fields.get(name)]:
        raise config.error(f"{problem}, and {biases[0]} leaves open whether experts have biases; {BY_HAND}")
    layers = set(applicable[0].layers(config, depth))
    if any(name in config for name in EXPERT_WIDTHS):
        return Family(applicable[:1], width=EXPERT_WIDTHS)
    if len(layers) < depth:
        raise config.error(f"{problem}, and the width of an expert is missing (moe_intermediate_size); {BY_HAND}")
    return Family(applicable[:1], width=WIDTH)


def _expert_width(config: Config, family: Family, depth: int) -> int:
    names = family.width
    width = config.required("the width of an expert", names, depth=depth)
    for name in set(EXPERT_WIDTHS) - set(names):
        if config.number(name, depth=depth) not in (None, width):
            raise config.error(
                f"{name} must be the width of an expert in {' or '.join(names)}, {width} (got "
                f"{shown(config.fields[name])})"
            )
    return width


def _moe_layers(config: Config, family: Family, depth: int) -> Layers:
    """Return the layers with experts by the family's rules; other fields must not contradict them."""
    rule = next((rule for rule in family.rules[:-1] if rule.is_set(config)), family.rules[-1])
    layers = tuple(sorted(rule.layers(config.over(family.defaults), depth)))
    read = {name for rule in family.rules for name in rule.fields} | set(family.ignores)
    for other in rules.ALL:
        foreign = [name for name in other.fields if name in config and name not in read]
        foreign = [name for name in foreign if config.fields[name] != rules.NEUTRAL.get(name)]
        if foreign and tuple(sorted(other.layers(config, depth))) != layers:
            raise config.error(
                f"{foreign[0]} {shown(config.fields[foreign[0]])} is not understood here: it contradicts the layers of "
                f"{' and '.join(rule.fields) or 'the code of this architecture'}; {BY_HAND}"
            )
    if not layers:
        raise config.error("no layer has experts; give the configuration of a mixture-of-experts model")
    return layers


def _check_activation(config: Config, family: Family) -> None:
    """Check that the activation does not change how many matrices an expert has."""
    for name in ACTIVATION:
        valid = PLAIN_ACTIVATIONS | (GATED_ACTIVATIONS if family.matrices == 3 else set())
        if name in config and (not isinstance(function := config.fields[name], str) or function not in valid):
            raise config.error(
                f"{name} {shown(config.fields[name])} is not understood; it may change how many matrices an expert has"
            )


def _other_params(config: Config, family: Family, hidden: int, width: int, depth: int) -> int:
    """Estimate a layer's parameters without routed experts, their router, norms and biases."""
    if family.always:
        widths = [config.number(name, depth=depth) or 0 for name in family.always]
    else:
        count = config.number(SHARED_COUNT, least=0, most=MOST_EXPERTS, depth=depth)
        own = config.number(SHARED, least=0, depth=depth)
        widths = [(width if own is None else own) * ((own is not None) if count is None else count)]
    attention = attention_params(config, hidden) if family.attentions else 0
    return family.matrices * hidden * sum(widths) + family.attentions * attention
