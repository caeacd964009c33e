"""Rules by which configurations describe their layers with experts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_beyond.model_config.fields import Config
from moe_beyond.safe_text import shown


@dataclass(frozen=True)
class Rule:
    """A rule by which configurations describe their layers with experts.

    Attributes:
        fields: Names of the fields that the rule reads.
        layers: Function of a configuration and the number of layers that returns the layers with experts; absent
            fields exclude no layer.
    """

    fields: tuple[str, ...]
    layers: Callable[[Config, int], Iterable[int]]

    def is_set(self, config: Config) -> bool:
        """Return whether a configuration has one of the fields.

        Args:
            config: Configuration of the model.
        """
        return any(name in config for name in self.fields)


SPARSE = {"sparse": True, "dense": False}
HASHED = {"moe": True, "hash_moe": True}
LETTERS = {"M": False, "E": True, "*": False, "-": False}
BLOCKS = {"moe": True} | dict.fromkeys(("linear_attention", "mamba", "full_attention", "attention", "mlp"), False)


def _flagged(flags: Iterable[bool]) -> Iterable[int]:
    return (layer for layer, holds in enumerate(flags) if holds)


def _type_rule(kinds: Mapping[str, bool]) -> Rule:
    return Rule(("mlp_layer_types",), lambda config, depth: _flagged(config.per_layer("mlp_layer_types", depth, kinds)))


def _all_but_first(name: str) -> Rule:
    return Rule((name,), lambda config, depth: range(min(config.index(name, 0), depth), depth))


def _multiples_after_first(config: Config, depth: int) -> Iterable[int]:
    layers = range(min(config.index("first_k_dense_replace", 0), depth), depth)
    if isinstance(config.fields.get("moe_layer_freq"), list):
        return set(layers) & set(_masked(config, depth))
    step = config.index("moe_layer_freq", 1, least=1)
    return (layer for layer in layers if layer % step == 0)


def _masked(config: Config, depth: int) -> Iterable[int]:
    return _flagged(config.per_layer("moe_layer_freq", depth, {0: False, 1: True}))


def _multiples_but_some(config: Config, depth: int) -> Iterable[int]:
    step = config.index("decoder_sparse_step", 1, least=1)
    dense = config.layer_list("mlp_only_layers", depth) if "mlp_only_layers" in config else ()
    return (layer for layer in range(depth) if (layer + 1) % step == 0 and layer not in dense)


def _multiples_between(config: Config, depth: int) -> Iterable[int]:
    first, step = config.index("moe_layer_start_index", 0), config.index("moe_layer_interval", 1, least=1)
    last = config.index("moe_layer_end_index", -1, least=-1)
    if max(first, last) >= depth:
        raise config.error(f"moe_layer_start_index {first}, moe_layer_end_index {last}: the model has {depth} layers")
    return (layer for layer in range(first, depth if last == -1 else last + 1) if (layer + 1) % step == 0)


def _at_period(config: Config, depth: int) -> Iterable[int]:
    period, offset = config.index("expert_layer_period", 1, least=1), config.index("expert_layer_offset", 0)
    if offset >= period:
        raise config.error(f"expert_layer_offset {offset} is not below expert_layer_period {period}")
    return range(offset, depth, period)


def _interleaved(config: Config, depth: int) -> Iterable[int]:
    step = config.index("interleave_moe_layer_step", 1, least=1)
    return range(step - 1, depth, step)


def _block_rule(*names: str) -> Rule:
    """Return the rule of models in which each layer is a mixer, an attention, a dense block, or experts."""

    def layers(config: Config, depth: int) -> Iterable[int]:
        kinds = {name: LETTERS if name == "hybrid_override_pattern" else BLOCKS for name in names if name in config}
        layouts = {name: tuple(_flagged(config.per_layer(name, depth, kind))) for name, kind in kinds.items()}
        if len(set(layouts.values())) != 1:
            raise config.error(f"{' and '.join(layouts or names[:2])} must describe the layers with experts, and agree")
        return next(iter(layouts.values()))

    return Rule(names, layers)


def _switched(config: Config, depth: int) -> Iterable[int]:
    if type(switch := config.fields.get("enable_moe_block", False)) is not bool:
        raise config.error(f"enable_moe_block must be true or false (got {shown(switch)})")
    return range(depth if switch else 0)


TYPES, HASHED_TYPES = _type_rule(SPARSE), _type_rule(HASHED)
FIRST = _all_but_first("first_k_dense_replace")
FIRST_AND_FREQUENCY = Rule(("first_k_dense_replace", "moe_layer_freq"), _multiples_after_first)
MASK = Rule(("moe_layer_freq",), _masked)
DENSE_COUNT, DENSE_INDEX = _all_but_first("num_dense_layers"), _all_but_first("dense_mlp_idx")
STEP = Rule(("decoder_sparse_step", "mlp_only_layers"), _multiples_but_some)
RANGE = Rule(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _multiples_between)
PERIOD = Rule(("expert_layer_period", "expert_layer_offset"), _at_period)
LISTED = Rule(("moe_layers",), lambda config, depth: config.layer_list("moe_layers", depth))
INTERLEAVED = Rule(("interleave_moe_layer_step",), _interleaved)
PATTERN = _block_rule("hybrid_override_pattern", "layers_block_type")
BLOCK_TYPES = _block_rule(*PATTERN.fields, "layer_types")  # elsewhere layer_types are kinds of attention
SWITCH = Rule(("enable_moe_block",), _switched)
FLAGS = Rule(
    ("is_moe_layer",),
    lambda config, depth: _flagged(config.per_layer("is_moe_layer", depth, {False: False, True: True})),
)
ALL = (
    TYPES, FIRST_AND_FREQUENCY, DENSE_COUNT, DENSE_INDEX, STEP, RANGE, PERIOD, LISTED, INTERLEAVED, PATTERN, SWITCH,
    FLAGS,
)  # fmt: skip
"""All rules; fields that an architecture does not read must not contradict those that it reads."""
NEUTRAL: dict[str, Any] = {"moe_layer_freq": 1, "decoder_sparse_step": 1, "mlp_only_layers": []}
"""Values that contradict no rule."""


def all_but(dense: int) -> Rule:
    """Return the rule of an architecture whose code makes the first layers dense, without reading a field.

    Args:
        dense: Number of dense layers at the start.
    """
    return Rule((), lambda config, depth: range(min(dense, depth), depth))
